"""Where the stages run: resources, workers and what engines do with them. Never part of an artifact's identity."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from schemas.sections import Backend, Device, Section, Split, Strategy, Tracker

# Ray's label of nodes that can be taken away at short notice, and the labels that Ray's syntax allows to select:
# a value, `in(a, b)`, and either of them with `!` before it.
MARKET, SPOT = "ray.io/market-type", "spot"
VALUE = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
SELECTOR = re.compile(rf"!?(?:{VALUE}|in\({VALUE}(?:, ?{VALUE})*\))")
# Ray has fields of their own for these.
BUILT_IN = ("CPU", "GPU", "memory", "object_store_memory")


class WorkerPlacement(Section):
    """Resources of the workers of one stage, and the nodes that they may run on.

    ``memory_per_worker`` in GiB is set aside on the node; ``accelerator_type`` as Ray names it (``H100``, ``L4``).
    ``resources`` are custom ones, an amount a worker; ``labels`` select nodes (``pool: teacher``, ``zone: in(a, b)``,
    ``pool: "!student"``); ``spot: false`` keeps off nodes that can be taken away. A session of this machine alone has
    one node, which is every pool: there these three say nothing.
    """

    workers: int = Field(1, ge=1)
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)
    memory_per_worker: float | None = Field(None, gt=0)
    accelerator_type: str | None = None
    resources: dict[str, float] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)
    spot: bool = True

    @field_validator("resources")
    @classmethod
    def _custom(cls, value: dict[str, float]) -> dict[str, float]:
        for name, amount in value.items():
            if name in BUILT_IN:
                raise ValueError(
                    f"{name} is not a custom resource; use cpus_per_worker, gpus_per_worker, memory_per_worker"
                )
            if amount <= 0 or (amount > 1 and amount != int(amount)):
                raise ValueError(f"{name}: {amount:g} is not an amount: a whole number, or a part of one")
        return value

    @field_validator("labels")
    @classmethod
    def _selects(cls, value: dict[str, str]) -> dict[str, str]:
        return selectors(value)

    @model_validator(mode="after")
    def _one_market(self) -> "WorkerPlacement":
        if not self.spot and MARKET in self.labels:
            raise ValueError(f"labels: {MARKET} and `spot: false` say the same; give one of them")
        return self

    @property
    def selector(self) -> dict[str, str]:
        """Which nodes, as Ray's label selector."""
        return self.labels if self.spot else {**self.labels, MARKET: f"!{SPOT}"}


def selectors(value: dict[str, str]) -> dict[str, str]:
    """The label selectors, checked.

    Raises:
        ValueError: one is not in Ray's syntax.
    """
    for name, text in value.items():
        if not SELECTOR.fullmatch(text):
            raise ValueError(f"{name}: {text!r} selects nothing; expected a value, `in(a, b)`, or either after `!`")
    return value


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
    its own. Without GPUs there is a process of ``tensor`` for each of the worker's CPUs. ``decoder_labels`` select the
    nodes of the CPU workers, as ``labels`` those of the teacher's. A shard whose worker is lost is begun again up to
    ``retries`` times by one command.
    """

    batch: int = Field(32, ge=1)
    decoders: int = Field(2, ge=1)
    decoder_labels: dict[str, str] = Field(default_factory=dict)
    split: Split = "layers"
    # as for prepare
    retries: int = Field(3, ge=0)

    @field_validator("decoder_labels")
    @classmethod
    def _selects_decoders(cls, value: dict[str, str]) -> dict[str, str]:
        return selectors(value)

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
    """One worker a model, ``batch`` questions at a time; with ``workers: 0`` this process, one model after another."""

    workers: int = Field(1, ge=0)
    batch: int = Field(32, ge=1)


class DistillPlacement(WorkerPlacement):
    """Student workers; nothing here changes what is learnt, beyond the rounding of sums.

    With ``min_workers`` the group goes on with as few where the cluster has no more. A worker's part of a step is cut
    into micro-batches of at most ``micro_batch`` samples and ``padding`` (a share of their tokens). ``align`` spreads
    the layers of phases without a model body over the workers, or their samples (``data``). A failed worker group is
    started again up to ``retries`` times without a new checkpoint in between. ``workers: 0`` trains in this process,
    without Ray: the same steps as one worker's.
    """

    workers: int = Field(1, ge=0)
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
        if not self.workers and self.strategy != "ddp":
            raise ValueError(f"workers: 0 is this process alone, and strategy {self.strategy} needs a group of workers")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers ({self.min_workers}) exceeds workers ({self.workers})")
        return self


class Placement(Section):
    """Where the stages run. Changing it never changes what a stage makes, beyond the hardware's rounding.

    A placement that the cluster's nodes cannot hold is refused, or with ``autoscales`` waited for: the cluster adds
    nodes when work asks for them.
    """

    device: Device = "auto"
    backend: Backend = "auto"
    autoscales: bool = False
    prepare: PreparePlacement = PreparePlacement()
    cache: CachePlacement = CachePlacement()
    distill: DistillPlacement = DistillPlacement()
    evaluate: EvaluatePlacement = EvaluatePlacement()
