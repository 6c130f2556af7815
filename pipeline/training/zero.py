"""DeepSpeed's ZeRO as an engine: stage 1 shards the optimizer, 2 reduced gradients as well, 3 parameters too.

Nothing of DeepSpeed's own checkpoints is used, which load at one number of workers only: parameters and moments are
gathered by name. Trained parameters are float32, frozen ones of any type, and DeepSpeed casts neither.

Workers differ in what they call: a head once a chunk of positions, a vision tower where there are images, a mixer once
more where there are taps. DeepSpeed does not expect that in two places.
It reduces gradients in the order in which they become ready, and would add different ones up. So they are summed up on
each worker, as with `ddp`, and reduced once a step, in one order, with zeros for what the worker did not reach.
Stage 3 gathers what it has sharded when a module is called, and would hang. So it is shown only the frozen parts of the
layers that every micro-batch calls just once, and the trained parameters as the root's own, which are whole from the
beginning of a forward pass to its end and through the backward pass. Embedding, head and vision tower stay whole.
"""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.training.engine import MOMENTS, Measured, OptimizerRecipe, Worker, adamw, moment_key

# Elements that are reduced, gathered or fetched ahead at once. A tenth of DeepSpeed's default, whose buffers are made
# for models a hundred times as large: 0.2 GB of float32 still fills a link.
BUCKET = 50_000_000
# Smaller parameters are held whole by every worker in stage 3; DeepSpeed's default. Norms, biases, convolutions.
WHOLE = 100_000


class _Root(nn.Module):
    """What DeepSpeed sees of the model; the objective itself is no submodule."""

    def __init__(self, measured: Measured, trained: list[nn.Parameter], layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.call, self.trained = measured.__call__, trained
        for index, parameter in enumerate(trained):
            self.register_parameter(f"trained_{index}", parameter)
        self.frozen = nn.ModuleList(part for layer in layers for part in _frozen(layer))

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self.call(batch)
        return _Reaching.apply(loss, *self.trained), metrics


def _frozen(module: nn.Module) -> Iterator[nn.Module]:
    """The largest parts of a module without a parameter that trains."""
    if any(p.requires_grad for p in module.parameters()):
        for child in module.children():
            yield from _frozen(child)
    else:
        yield module


class ZeroEngine:
    """One worker of ZeRO; see `Engine` and the module's text."""

    def __init__(
        self,
        stage: int,
        offload: bool,
        objective: nn.Module,
        trained: dict[str, nn.Parameter],
        recipe: OptimizerRecipe,
        worker: Worker,
        layers: Sequence[nn.Module],
    ) -> None:
        self.deepspeed = _deepspeed(worker)
        self.stage, self.trained, self.worker = stage, trained, worker
        measured = Measured(objective)
        self.root = _Root(measured, list(trained.values()), layers if stage == 3 else ())
        # DeepSpeed leaves attributes on modules and parameters that a later engine would take for its own
        self.before = [(thing, dict(vars(thing))) for thing in (*self.root.modules(), *self.root.parameters())]
        self.linear = nn.functional.linear
        self.optimizer = adamw(trained, recipe)
        self.engine: Any = self.deepspeed.initialize(
            model=self.root,
            optimizer=self.optimizer,
            config=_config(stage, offload, recipe),
            dist_init_required=False,
        )[0]
        self.shards = (
            self.engine.optimizer.fp32_partitioned_groups_flat
            if stage == 3
            else self.engine.optimizer.single_partition_of_fp32_groups
        )
        self.window, self.open = ExitStack(), False
        self._begin()

    def _begin(self) -> None:
        """Moments of 0. DeepSpeed would make them in the first step and then miss those of the second group."""
        for shard in self.shards:
            step = torch.zeros((), device=shard.device)
            self.optimizer.state[shard] = dict(
                zip(MOMENTS, (torch.zeros_like(shard), torch.zeros_like(shard), step), strict=True)
            )
        if self.stage < 3:
            for parameters, shard in zip(self.engine.optimizer.bit16_groups, self.shards, strict=True):
                self.deepspeed.utils.lazy_init_hp_params_optimizer_state(parameters, shard, self.optimizer.state)

    def accumulate(self, batch: Any, *, last: bool) -> dict[str, Tensor]:
        """See `Engine`."""
        if not self.open:
            # DeepSpeed would reduce gradients as they become ready, in an order that differs where workers do
            self.window.enter_context(self.engine.coalesce_grad_reduction())
        loss, metrics = self.engine(batch)
        self.engine.backward(loss * self.worker.world)  # DeepSpeed averages over workers
        if last:
            self.window.close()
        self.open = not last
        return metrics

    @torch.no_grad()
    def measure(self, batch: Any) -> dict[str, Tensor]:
        """See `Engine`."""
        metrics: dict[str, Tensor] = self.engine(batch)[1]
        return metrics

    def step(self, lr: float) -> float:
        """See `Engine`."""
        self.engine.optimizer.set_lr(lr)
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def tensors(self) -> dict[str, Tensor]:
        """See `Engine`."""
        utils = self.deepspeed.utils
        found: dict[str, Tensor] = {}
        for name, parameter in self.trained.items():
            whole = {name: utils.safe_get_full_fp32_param(parameter)}
            for field in ("exp_avg", "exp_avg_sq"):
                whole[moment_key(name, field)] = utils.safe_get_full_optimizer_state(parameter, field)
            whole[moment_key(name, "step")] = self.optimizer.state[self.shards[0]]["step"]
            if self.worker.rank == 0:
                found |= {key: value.to("cpu", copy=True) for key, value in whole.items()}
        return found

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Engine`."""
        self._begin()
        for name, parameter in self.trained.items():
            if name in tensors:
                with self.deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    parameter.copy_(tensors[name])
                self._put(parameter, None, tensors[name])
            if moment_key(name, "step") in tensors:
                for field in ("exp_avg", "exp_avg_sq"):
                    self._put(parameter, field, tensors[moment_key(name, field)])
                # one counter a shard, which holds parts of many parameters: they all make every step
                for shard in self.shards:
                    self.optimizer.state[shard]["step"].copy_(tensors[moment_key(name, "step")])

    def _put(self, parameter: nn.Parameter, field: str | None, value: Tensor) -> None:
        """Writes a whole tensor into the shards: the optimizer's copy of a parameter, or a moment."""
        utils, kind = self.deepspeed.utils, "full"
        if self.stage == 3:  # whose setter of whole tensors takes no size that the workers do not divide
            size = utils.safe_get_local_fp32_param(parameter).numel()
            padded = nn.functional.pad(value.flatten(), (0, size * self.worker.world - value.numel()))
            kind, value = "local", padded.split(size)[self.worker.rank]
        value = value.to(self.worker.device)
        if field is None:
            getattr(utils, f"safe_set_{kind}_fp32_param")(parameter, value)
        else:
            getattr(utils, f"safe_set_{kind}_optimizer_state")(parameter, value, field)

    def close(self) -> None:
        """See `Engine`."""
        for parameter in self.root.parameters():
            with self.deepspeed.zero.GatheredParameters([parameter]):
                whole = parameter.data
            parameter.data = whole
            parameter.grad = None
        self.engine.destroy()
        # stage 3 puts one in its place that keeps no gathered weight for the backward pass, for the whole process
        nn.functional.linear = self.linear
        for thing, attributes in self.before:
            vars(thing).clear()
            vars(thing).update(attributes)


class _Reaching(torch.autograd.Function):
    """The loss, with gradients of 0 to all trained parameters besides its own.

    DeepSpeed reduces what has a gradient on the worker, and stage 3 would take for that of a parameter which nobody
    reaches what the step before left.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.shapes = [p.shape for p in parameters]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        zero = gradients[0].new_zeros(())
        return gradients[0], *(zero.expand(shape) for shape in ctx.shapes)


def _deepspeed(worker: Worker) -> Any:
    """The package, told which device is this worker's, quiet, and without what it would compile for the CPU."""
    # it knows its device by these two alone, the second as an index among the visible ones
    os.environ["DS_ACCELERATOR"] = worker.device.type
    os.environ["LOCAL_RANK"] = str(worker.device.index or 0)
    import deepspeed

    # it calls collectives by names that torch gives up, one warning a place
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    # an all-reduce in shared memory: a minute of g++ for what gloo does as well
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _config(stage: int, offload: bool, recipe: OptimizerRecipe) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_param_persistence_threshold": WHOLE,
    }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return {
        "zero_optimization": zero,
        "gradient_clipping": recipe.clip,
        # asked for, but of no effect: batches come from outside
        "train_micro_batch_size_per_gpu": 1,
        # torch's fused AdamW steps on the CPU as well
        "zero_force_ds_cpu_optimizer": False,
    }
