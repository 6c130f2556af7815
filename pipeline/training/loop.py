"""The training loop: phases of optimizer steps over cached batches. Knows no Ray: worker and ``report`` come in.

Resuming is arithmetic: a checkpoint holds phase and step, and the batches and random numbers of a step follow from
them.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.initialise import match_gain
from pipeline.models import decoder
from pipeline.surgery import mixers, trainable_names
from pipeline.training.batch import Batch
from pipeline.training.batches import CachedBatches, use_of
from pipeline.training.checkpoint import Saving, TrainState, latest_checkpoint, save_best, save_checkpoint
from pipeline.training.diverged import diverged
from pipeline.training.engine import Engine, OptimizerRecipe, Worker, make_engine
from pipeline.training.execution import checkpoint_layers, compile_layers, mix_precision, run_ahead
from pipeline.training.mixing import MatrixObjective, require_matrix
from pipeline.training.objective import DistillObjective, LayerObjective, kl_names
from pipeline.training.recompute import TeacherLayers
from pipeline.training.schedule import learning_rate
from pipeline.training.watch import Window
from schemas.artifacts import LOG
from schemas.config import StudentConfig
from schemas.errors import ConfigInvalid, MemoryExhausted
from schemas.placement import DistillPlacement
from schemas.recipe import AnyPhase, DistillConfig, Schedule

# Tapped samples that set the gain of `mimic` and the scale of the layer loss: thousands of tokens for a few numbers.
CALIBRATION_SAMPLES = 32
LOG_EVERY = 10
# The log on disk is written anew at most this often, in seconds: on object storage each time is a request.
LOG_SECONDS = 5.0

Report = Callable[[dict[str, Any]], None]
# Whether the workers must go, asked after every step; all of them get the same answer.
Leaves = Callable[[], bool]


def stays() -> bool:
    """The answer where nothing takes workers away."""
    return False


class Training:
    """One worker's training of one student."""

    def __init__(
        self,
        model: PreTrainedModel,
        batches: CachedBatches,
        recipe: DistillConfig,
        placement: DistillPlacement,
        student: StudentConfig,
        worker: Worker,
        saving: Saving,
        teacher: TeacherLayers | None = None,
        started: frozenset[int] = frozenset(),
    ) -> None:
        """``model``, its trained parameters in float32, is on the CPU; its body stays there until a phase runs it.

        ``teacher`` has the replaced attention, for targets that the cache does not hold. ``started`` are the layers
        whose mixers come from an earlier student.
        """
        self.model, self.batches, self.recipe, self.placement = model, batches, recipe, placement
        self.teacher, self.worker, self.saving = teacher, worker, saving
        self.schedules = [self._schedule(number) for number in range(len(recipe.phases))]
        self.parameters = dict(model.named_parameters())
        self.trainable = trainable_names(model, student.train)
        for mixer in mixers(model).values():
            mixer.to(worker.device)
        if teacher:
            teacher.to(worker.device)
        self.power = self._calibrate(started if student.init == "mimic" else frozenset(mixers(model)))
        self.state, self.written = TrainState(), 0.0
        self.initial = self.final = self.trained()
        run_ahead(model)
        if recipe.dtype == "bfloat16":
            mix_precision(model, student.train, worker.device)
        if placement.compile:
            compile_layers(model)
        if placement.activation_checkpointing:
            checkpoint_layers(model)

    def _schedule(self, number: int) -> Schedule:
        phase = self.recipe.phases[number]
        try:
            return phase.schedule(self.batches.index.count(use_of(phase)))
        except ValueError as error:
            raise ConfigInvalid(f"distill.phases.{number}: {error}") from None

    def _calibrate(self, fixed: frozenset[int]) -> dict[int, float]:
        """Mean squared norm a token of each layer's target; also sets the gains of mixers that are not ``fixed``."""
        taps = self.batches.first_taps(CALIBRATION_SAMPLES) if self.batches.layers else []
        power = {}
        for index, mixer in mixers(self.model).items():
            pairs = [self._pair(index, *tap[index]) for tap in taps if index in tap]
            if pairs and index not in fixed:
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

    def run(self, report: Report, leaves: Leaves = stays) -> bool:
        """Trains from the latest checkpoint, or from the start; whether it came to the end of the last phase.

        Where the workers must leave before that, the step that was done last is in a checkpoint.

        Raises:
            TrainingDiverged: a step's gradient is not finite; checkpoints stay as they are.
            MemoryExhausted: the device has too little memory.
        """
        found, tensors = latest_checkpoint(self.saving), dict[str, Tensor]()
        if found:
            self.state, tensors = found
            with torch.no_grad():
                for name in self.trainable:
                    self.parameters[name].copy_(tensors[name])
            self.final = self.trained()
        try:
            while self.state.phase < len(self.recipe.phases):
                if not self._phase(self.recipe.phases[self.state.phase], tensors, report, leaves):
                    return False
                tensors = {}
        except torch.OutOfMemoryError as error:
            raise MemoryExhausted(self._remedies(str(error))) from None
        self._write_log(now=True)
        return True

    def _phase(self, phase: AnyPhase, tensors: dict[str, Tensor], report: Report, leaves: Leaves) -> bool:
        mine = self._layers(phase)
        objective = self._objective(phase, mine)
        chosen = {n: p for n in self.trainable if (p := self.parameters[n]).requires_grad}
        strategy = self.placement.strategy if phase.kind == "distill" else "ddp"  # mixers alone fit anywhere
        # the matrices of `match` depend on half of a weight, and the other half is not to shrink
        decay = 0.0 if phase.kind == "match" else self.recipe.weight_decay
        how = OptimizerRecipe(self.recipe.betas, decay, self.recipe.clip)
        layers: Any = decoder(self.model).layers if phase.kind == "distill" else ()
        engine = make_engine(strategy, self.placement.offload, objective, chosen, how, self.worker, layers)
        engine.restore(tensors)
        schedule, seed = self.schedules[self.state.phase], self.recipe.seed + self.state.phase
        rank, world = (self.worker.rank, self.worker.world) if mine is None else (0, 1)
        steps = range(self.state.step, schedule.steps)
        stream = self.batches.stream(phase, steps, seed, rank, world, self.worker.device, mine)
        window = Window(self.worker)
        for step in steps:
            torch.manual_seed(_seed_of(seed, step))
            self._step(engine, stream, window, learning_rate(schedule, step), step)
            self.state.step = step + 1
            last, going = step + 1 == schedule.steps, leaves()
            saves = going or (step + 1) % self.recipe.checkpoint_every == 0
            validates = phase.kind == "distill" and self._validates(step + 1, last=last)
            # also before each checkpoint, so that a resumed curve averages over the same steps
            if (step + 1) % LOG_EVERY == 0 or step == 0 or saves or last or validates:
                found = self._validate(engine) if validates else {}
                self._log(phase, window, found, report)
                window = Window(self.worker)
            if saves and not last:
                self._save(self.trained() | engine.tensors())
                if going:
                    engine.close()
                    return False
        tensors = engine.tensors()
        self.final = self.trained() | {n: t for n, t in tensors.items() if n in self.parameters}
        self.state.phase, self.state.step = self.state.phase + 1, 0
        self._save(self.final)
        engine.close()
        return True

    def _step(self, engine: Engine, stream: Iterator[Batch], window: Window, lr: float, step: int) -> None:
        """One optimizer step over the worker's micro-batches."""
        losses: list[tuple[Batch, Tensor]] = []
        while not losses or not losses[-1][0].last:
            before = time.monotonic()
            batch = next(stream)
            window.wait(time.monotonic() - before)
            metrics = engine.accumulate(batch, last=batch.last)
            window.micro_batch(batch, metrics)
            losses.append((batch, metrics["loss"]))
        norm = engine.step(lr)
        if not math.isfinite(norm):
            raise diverged(self.batches, losses, self.worker, self.state.phase, step, norm)
        window.step(batch, norm)

    def _layers(self, phase: AnyPhase) -> tuple[int, ...] | None:
        """This worker's layers, where a phase's layers are spread over the workers; None where its samples are."""
        found, world, how = tuple(mixers(self.model)), self.worker.world, self.placement.align
        if phase.kind == "distill" or world == 1 or how == "data" or len(found) < world:
            return None
        if how == "auto" and len(found) % world:
            return None  # some workers would wait for others
        return found[self.worker.rank :: world]

    def _objective(self, phase: AnyPhase, mine: tuple[int, ...] | None) -> nn.Module:
        """The phase's objective; exactly what the phase trains requires gradients afterwards.

        Where layers are spread, a worker computes its own; the sum of gradients over workers brings those of the rest.
        """
        self.model.requires_grad_(False).eval()  # frozen modules have no dropout
        every = mixers(self.model)
        own = {i: m for i, m in every.items() if mine is None or i in mine}
        if phase.kind == "match":
            assert self.teacher is not None
            for mixer in every.values():
                require_matrix(mixer)
            return MatrixObjective(own, self.teacher)
        layer = LayerObjective(own, self.recipe, self.power, self.teacher)
        if phase.kind == "align":
            for mixer in every.values():
                mixer.requires_grad_(True)
            return layer
        for name in self.trainable:
            self.parameters[name].requires_grad_(True)
        self.model.to(self.worker.device)
        teachers = [(source.share, source.cache.targets.temperature) for source in self.batches.sources]
        return DistillObjective(self.model, layer, phase.weights, teachers, self.recipe)

    def _validates(self, done: int, *, last: bool) -> bool:
        validation = self.recipe.validation
        return validation.fraction > 0 and (last or done % validation.every == 0)

    def _validate(self, engine: Engine) -> dict[str, float]:
        """Mean divergence and top-1 agreement on the samples held out; keeps the best parameters so far."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.worker.device)
        even = self.placement.strategy == "zero3"
        for batch in self.batches.held_out(self.worker.rank, self.worker.world, self.worker.device, even=even):
            found = engine.measure(batch)
            sums += torch.stack([found["kl"], found["top1"], found["kl"].new_tensor(len(batch.positions))])  # type: ignore[arg-type]
        if self.worker.world > 1:
            dist.all_reduce(sums)
        kl, top1 = (sums[:2] / sums[2]).tolist()
        if self.recipe.result == "best" and (self.state.best is None or kl < self.state.best):
            self.state.best = kl
            tensors = engine.tensors()
            if self.worker.rank == 0:
                save_best(self.saving, self.state, {n: tensors[n] for n in self.trainable})
        return {"held_out_kl": round(kl, 6), "held_out_top1": round(top1, 6)}

    def _log(self, phase: AnyPhase, window: Window, found: dict[str, float], report: Report) -> None:
        """Adds an entry to the curve and, now and then, writes it."""
        # a worker without tapped rows has no layer metrics; every worker must send the same keys
        layers = [f"layer_{i}" for i in mixers(self.model)]
        names = ["loss", *layers]
        if phase.kind == "distill":
            weights = phase.weights
            kl = ["kl", *kl_names(len(self.batches.sources))] if weights.kl else []
            names = ["loss", *kl, *(["ce"] if weights.ce else [])]
            names += layers if weights.layer else []
        number, step = self.state.phase, self.state.step
        schedule = self.schedules[number]
        entry = {
            **window.entry(names),
            **found,
            "phase": number,
            "kind": phase.kind,
            "step": step,
            "steps": schedule.steps,
            "done": sum(s.steps for s in self.schedules[:number]) + step,
            "total": sum(s.steps for s in self.schedules),
            "lr": learning_rate(schedule, step - 1),
        }
        self.state.history.append(entry)
        self._write_log(now=False)
        report(entry)

    def _write_log(self, *, now: bool) -> None:
        if self.worker.rank or not (now or time.monotonic() - self.written > LOG_SECONDS):
            return
        lines = "".join(json.dumps(entry) + "\n" for entry in self.state.history)
        self.saving.store.write(f"{self.saving.ref}/{LOG}", lines.encode())
        self.written = time.monotonic()

    def _save(self, tensors: dict[str, Tensor]) -> None:
        if self.worker.rank == 0:
            self._write_log(now=True)
            save_checkpoint(self.saving, self.state, tensors)
        if self.worker.world > 1:
            dist.barrier()

    def _remedies(self, message: str) -> str:
        place, model = "placement.distill", self.placement
        ways = [f"{place}.micro_batch ({model.micro_batch}) lower"] if model.micro_batch > 1 else []
        ways += [] if model.activation_checkpointing else [f"{place}.activation_checkpointing true"]
        ways += [f"{place}.strategy zero3 with offload"] if model.strategy != "zero3" or not model.offload else []
        what = message.partition(". ")[0]
        return f"worker {self.worker.rank} on {self.worker.device}: {what}. Set {', or '.join(ways)}"


def _seed_of(seed: int, step: int) -> int:
    """Random numbers are a function of the step as well, so that a resumed run draws what it would have drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}".encode()).digest()[:7], "big")
