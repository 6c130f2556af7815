"""Where the stages run: resources, workers and what engines do with them. Never part of an artifact's identity."""

from typing import Literal

from pydantic import Field, model_validator

from schemas.sections import Backend, Device, Section, Split, Strategy, Tracker


class WorkerPlacement(Section):
    """Resources of the workers of one stage; ``accelerator_type`` as Ray names it (``H100``, ``A100``, ``L4``)."""

    workers: int = Field(1, ge=1)
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)
    accelerator_type: str | None = None


class PreparePlacement(WorkerPlacement):
    """Workers; none at all means this process, which is faster for some thousand samples than starting Ray.

    GPUs are of use where the teacher answers (``prepare.answers``), ``batch`` prompts at a time. A shard whose worker
    is lost is begun again up to ``retries`` times by one command.
    """

    workers: int = Field(1, ge=0)
    batch: int = Field(16, ge=1)
    # as many as distill's: nodes come and go, but what ends four workers in a row ends the fifth as well
    retries: int = Field(3, ge=0)


class CachePlacement(WorkerPlacement):
    """Teacher workers, ``batch`` samples a forward, and the CPU workers that decode images for them.

    A worker with several GPUs spreads one teacher over them, for teachers too large for one. ``split: layers`` puts
    whole layers on each, which work in turn; ``tensor`` cuts every matrix, and all work at once, each by a process of
    its own. Without GPUs there is a process of ``tensor`` for each of the worker's CPUs. A shard whose worker is lost
    is begun again up to ``retries`` times by one command.
    """

    batch: int = Field(32, ge=1)
    decoders: int = Field(2, ge=1)
    split: Split = "layers"
    # as for prepare
    retries: int = Field(3, ge=0)

    @property
    def parts(self) -> int:
        """Over how many devices a worker's teacher is spread."""
        if self.split == "tensor" and not self.gpus_per_worker:
            return int(self.cpus_per_worker)
        return max(1, int(self.gpus_per_worker))

    @model_validator(mode="after")
    def _divides(self) -> "CachePlacement":
        amount = self.gpus_per_worker or (self.cpus_per_worker if self.split == "tensor" else 1)
        if amount > 1 and amount != int(amount):
            raise ValueError(f"a teacher cannot be split over {amount:g} devices; give a worker a whole number")
        if self.split == "tensor" and amount < 2:
            raise ValueError("split: `tensor` needs a worker with several GPUs, or with several CPUs and no GPU")
        return self


class EvaluatePlacement(WorkerPlacement):
    """One worker a model, ``batch`` questions at a time."""

    batch: int = Field(32, ge=1)


class DistillPlacement(WorkerPlacement):
    """Student workers; nothing here changes what is learnt, beyond the rounding of sums.

    With ``min_workers`` the group goes on with as few where the cluster has no more. A worker's part of a step is cut
    into micro-batches of at most ``micro_batch`` samples and ``padding`` (a share of their tokens). ``align`` spreads
    the layers of phases without a model body over the workers, or their samples (``data``). A failed worker group is
    started again up to ``retries`` times without a new checkpoint in between.
    """

    min_workers: int | None = Field(None, ge=1)
    strategy: Strategy = "ddp"
    offload: bool = False
    micro_batch: int = Field(8, ge=1)
    padding: float = Field(0.05, ge=0, lt=1)
    align: Literal["auto", "layers", "data"] = "auto"
    activation_checkpointing: bool = False
    compile: bool = False
    readers: int = Field(2, ge=1)
    retries: int = Field(3, ge=0)
    trackers: tuple[Tracker, ...] = ()

    @model_validator(mode="after")
    def _agrees(self) -> "DistillPlacement":
        if self.offload and self.strategy == "ddp":
            raise ValueError("offload needs one of the strategies zero1, zero2, zero3")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers ({self.min_workers}) exceeds workers ({self.workers})")
        return self


class Placement(Section):
    """Where the stages run. Changing it never changes what a stage makes, beyond the hardware's rounding."""

    device: Device = "auto"
    backend: Backend = "auto"
    prepare: PreparePlacement = PreparePlacement()
    cache: CachePlacement = CachePlacement()
    distill: DistillPlacement = DistillPlacement()
    evaluate: EvaluatePlacement = EvaluatePlacement()
