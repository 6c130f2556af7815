"""The training loop: phases of optimizer steps over cached batches. Knows no Ray: rank, world and ``report`` come in.

Resuming is arithmetic: a checkpoint holds phase and step, and the batches of a step are a function of them.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from pipeline.initialise import match_gain
from pipeline.store import Store
from pipeline.surgery import mixers, trainable_names
from pipeline.training.batches import CachedBatches
from pipeline.training.checkpoint import (
    TrainState,
    latest_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from pipeline.training.objective import DistillObjective, LayerObjective
from pipeline.training.recompute import TeacherLayers
from pipeline.training.schedule import learning_rate
from schemas.artifacts import ArtifactRef
from schemas.config import AlignPhase, DistillConfig, DistillPhase, StudentConfig

# Tapped samples that set the gain of `mimic` and the scale of the layer loss: thousands of tokens for a few numbers.
CALIBRATION_SAMPLES = 32
LOG_EVERY = 10

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Worker:
    """Who this process is among the workers, and where it computes."""

    rank: int
    world: int
    device: torch.device


@dataclass(frozen=True)
class Saving:
    """Where checkpoints of this run go."""

    store: Store
    ref: ArtifactRef
    fingerprint: str


class Window:
    """Sums of one worker's metrics over the steps since the last log entry."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = self.tap_steps = 0

    def add(self, metrics: dict[str, Tensor], tapped: bool) -> None:
        """Adds one step; ``tapped`` says whether any worker's batch held taps."""
        self.steps += 1
        self.tap_steps += tapped
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().float()

    def divisor(self, name: str) -> int:
        """The number of steps that the metric was measured in."""
        return max(1, self.tap_steps if name.startswith("layer_") else self.steps)


class Training:
    """One worker's training of one student."""

    def __init__(
        self,
        model: PreTrainedModel,
        batches: CachedBatches,
        config: DistillConfig,
        temperature: float,
        student: StudentConfig,
        worker: Worker,
        saving: Saving,
        teacher: TeacherLayers | None = None,
    ) -> None:
        """``teacher`` gives the layers' targets where the cache holds inputs alone."""
        self.model, self.batches, self.config, self.teacher = model, batches, config, teacher
        self.temperature, self.worker, self.saving = temperature, worker, saving
        self.parameters = dict(model.named_parameters())
        self.trainable = trainable_names(model, student.train)
        for name in self.trainable:
            self.parameters[name].data = self.parameters[name].data.float()
        self.names = {id(self.parameters[n]): n for n in self.trainable}
        self.power = self._calibrate(matches=student.init == "mimic")
        self.state = TrainState()
        self.initial = self.trained()

    def _calibrate(self, *, matches: bool) -> dict[int, float]:
        """Mean squared norm a token of each layer's target; if it ``matches``, also sets the mixers' gains."""
        taps = self.batches.first_taps(CALIBRATION_SAMPLES) if self.batches.layers else []
        power = {}
        for index, mixer in mixers(self.model).items():
            pairs = [self._pair(index, *tap[index]) for tap in taps if index in tap]
            if pairs and matches:
                match_gain(mixer, [(u.to(mixer.out_proj.weight.dtype), a) for u, a in pairs])
            norms = torch.cat([a.square().sum(-1) for _, a in pairs]) if pairs else torch.ones(1)
            power[index] = float(norms.mean())
        return power

    def _pair(self, layer: int, u_LD: Tensor, a_LD: Tensor | None) -> tuple[Tensor, Tensor]:
        """A layer's input and target on the worker's device, in float32."""
        u_LD = u_LD.to(self.worker.device)
        if a_LD is None:
            assert self.teacher is not None, "a cache without outputs needs the teacher's layers"
            a_LD = self.teacher.output(layer, u_LD[None])[0].float()
        return u_LD, a_LD.to(self.worker.device)

    def trained(self) -> dict[str, Tensor]:
        """A copy of the trainable parameters, by name."""
        return {n: self.parameters[n].detach().cpu().clone() for n in self.trainable}

    def run(self, report: Report) -> TrainState:
        """Trains from the latest checkpoint, or from the start, to the end of the last phase."""
        found = latest_checkpoint(self.saving.store, self.saving.ref, self.saving.fingerprint)
        moments: dict[str, Tensor] = {}
        if found:
            self.state, tensors = found
            with torch.no_grad():
                for name in self.trainable:
                    self.parameters[name].copy_(tensors[name])
            moments = {k: v for k, v in tensors.items() if k.startswith("optimizer.")}
        while self.state.phase < len(self.config.phases):
            self._phase(self.config.phases[self.state.phase], moments, report)
            moments = {}
        return self.state

    def _phase(self, phase: AlignPhase | DistillPhase, moments: dict[str, Tensor], report: Report) -> None:
        objective = self._objective(phase)
        chosen = [p for p in objective.parameters() if p.requires_grad]
        wrapped: nn.Module = objective
        if self.worker.world > 1:
            wrapped = DistributedDataParallel(objective)
        optimizer = self._optimizer(chosen)
        restore_optimizer(optimizer, self.names, moments)
        stream = self.batches.stream(
            phase, self.config.seed + self.state.phase, self.state.step, self.worker.rank, self.worker.world
        )
        started, waited, first, window = time.monotonic(), 0.0, self.state.step, Window()
        while True:
            before = time.monotonic()
            batch = next(stream, None)
            waited += time.monotonic() - before
            if batch is None:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(phase, self.state.step)
            metrics = self._step(wrapped, chosen, optimizer, batch.to(self.worker.device))
            window.add(metrics, batch.global_tap_tokens > 0)
            self.state.step += 1
            last = self.state.step == phase.steps
            saves = self.state.step % self.config.checkpoint_every == 0
            # also before each checkpoint, so that a resumed curve averages over the same steps
            if self.state.step % LOG_EVERY == 0 or self.state.step == 1 or saves or last:
                seconds = time.monotonic() - started
                self._log(phase, window, (self.state.step - first) / seconds, waited / seconds, report)
                window = Window()
            if saves and not last:
                self._save(optimizer)
        self.state.phase, self.state.step = self.state.phase + 1, 0
        self._save(None)

    def _objective(self, phase: AlignPhase | DistillPhase) -> nn.Module:
        """The phase's objective; exactly its parameters require gradients afterwards."""
        found = mixers(self.model)
        layer = LayerObjective(found, self.config.layer_loss, self.power, self.teacher)
        self.model.requires_grad_(False).eval()  # frozen modules have no dropout
        if phase.kind == "align":
            return layer.requires_grad_(True)
        for name in self.trainable:
            self.parameters[name].requires_grad_(True)
        return DistillObjective(self.model, layer, phase.weights, self.temperature)

    def _optimizer(self, chosen: list[nn.Parameter]) -> torch.optim.AdamW:
        """No weight decay on biases, norms, decays and step sizes: everything of one dimension."""
        groups = [
            {"params": [p for p in chosen if p.dim() > 1], "weight_decay": self.config.weight_decay},
            {"params": [p for p in chosen if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=0.0, betas=self.config.betas)

    def _step(
        self, objective: nn.Module, chosen: list[nn.Parameter], optimizer: torch.optim.Optimizer, batch: Any
    ) -> dict[str, Tensor]:
        bf16 = self.config.dtype == "bfloat16"
        with torch.autocast(self.worker.device.type, torch.bfloat16) if bf16 else nullcontext():
            loss, metrics = objective(batch)
        # the losses are divided by counts over all workers; DDP averages gradients, the objective is their sum
        (loss * self.worker.world).backward()
        norm = nn.utils.clip_grad_norm_(chosen, self.config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": loss, **metrics, "grad_norm": norm}

    def _log(self, phase: AlignPhase | DistillPhase, window: Window, rate: float, wait: float, report: Report) -> None:
        """Logs means over the window's steps of what the workers measured together."""
        # a worker without tapped rows has no layer metrics; every worker must send the same keys
        names = ["loss", *(["kl"] if phase.kind == "distill" else []), *(f"layer_{i}" for i in mixers(self.model))]
        if phase.kind == "distill" and phase.weights.ce:
            names.append("ce")
        zero = torch.zeros((), device=self.worker.device)
        values = torch.stack([window.sums.get(n, zero) / window.divisor(n) for n in names])
        if self.worker.world > 1:
            dist.all_reduce(values)
        entry: dict[str, Any] = {n: round(v, 6) for n, v in zip(names, values.tolist(), strict=True)}
        entry |= {
            "phase": self.state.phase,
            "kind": phase.kind,
            "step": self.state.step,
            "steps": phase.steps,
            "lr": learning_rate(phase, self.state.step - 1),
            "grad_norm": round(float(window.sums["grad_norm"] / window.steps), 6),
            "steps_per_second": round(rate, 3),
            "waiting_share": round(wait, 4),
        }
        self.state.history.append(entry)
        report(entry)

    def _save(self, optimizer: torch.optim.Optimizer | None) -> None:
        if self.worker.rank == 0:
            tensors = self.trained()
            if optimizer is not None:
                tensors |= optimizer_tensors(optimizer, self.names)
            save_checkpoint(self.saving.store, self.saving.ref, self.saving.fingerprint, self.state, tensors)
        if self.worker.world > 1:
            dist.barrier()
