"""How a student is trained: phases, losses and schedules of the ``distill`` section."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from schemas.sections import ARTIFACT, Divergence, Dtype, Section, StageSection


class LossWeights(Section):
    """α (KL), β (layer) and γ (cross-entropy) of the total loss."""

    kl: float = Field(1.0, ge=0)
    layer: float = Field(1.0, ge=0)
    ce: float = Field(0.0, ge=0)


class Phase(Section):
    """Optimizer steps with one learning-rate schedule: linear warm-up, constant, cosine decay to zero.

    Its length is in ``steps`` or in ``epochs`` over the samples that it can use, warm-up and decay in steps or samples.
    """

    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    batch: int = Field(64, ge=1)
    lr: float = Field(2e-4, gt=0)
    warmup_steps: int = Field(0, ge=0)
    decay_steps: int = Field(0, ge=0)
    warmup_samples: int | None = Field(None, ge=0)
    decay_samples: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> "Phase":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        for name in ("warmup", "decay"):
            if getattr(self, f"{name}_steps") and getattr(self, f"{name}_samples") is not None:
                raise ValueError(f"give either {name}_steps or {name}_samples")
        if self.steps is not None:
            self.schedule(0)
        return self

    def schedule(self, samples: int) -> "Schedule":
        """The phase in steps, over so many samples an epoch.

        Raises:
            ValueError: warm-up and decay are longer than the phase.
        """
        steps = self.steps if self.steps is not None else max(1, math.ceil((self.epochs or 0) * samples / self.batch))
        warmup, decay = (
            given if counted is None else round(counted / self.batch)
            for given, counted in ((self.warmup_steps, self.warmup_samples), (self.decay_steps, self.decay_samples))
        )
        if warmup + decay > steps:
            raise ValueError(f"warm-up ({warmup} steps) and decay ({decay}) exceed the phase's {steps} steps")
        return Schedule(steps, warmup, decay, self.lr)


@dataclass(frozen=True)
class Schedule:
    """A phase's length and learning rate in optimizer steps."""

    steps: int
    warmup: int
    decay: int
    lr: float


class MatchPhase(Phase):
    """Mixers alone, from the taps: their mixing matrices against the attention's weights (MOHAWK's first phase)."""

    kind: Literal["match"]


class AlignPhase(Phase):
    """Mixers alone, from the taps: no model body runs."""

    kind: Literal["align"]


class DistillPhase(Phase):
    """The whole student on cached targets, with the layer loss where a batch has taps."""

    kind: Literal["distill"]
    weights: LossWeights = LossWeights()

    @model_validator(mode="after")
    def _reaches_all(self) -> "DistillPhase":
        if self.weights.kl == self.weights.ce == 0:
            raise ValueError("weights.kl and weights.ce are both 0: the layer loss alone is an `align` phase")
        return self


AnyPhase = MatchPhase | AlignPhase | DistillPhase


class ValidationConfig(Section):
    """Samples held out of training, chosen by ``sample_id``: divergence and top-1 agreement on them every so often."""

    fraction: float = Field(0.0, ge=0, lt=1)
    every: int = Field(200, ge=1)


class OtherTeacher(Section):
    """A finished cache of the same samples by another teacher of the same tokenizer, and how much its targets weigh."""

    cache: str = Field(pattern=ARTIFACT)
    weight: float = Field(1.0, gt=0)


class DistillConfig(StageSection):
    """How the student is trained. Betas, decay and clipping default to MaTVLM's.

    The divergence is the mean of those from the run's own cache, which weighs ``own_weight``, and from the caches of
    other ``teachers``; taps, features and gold tokens are the run's own alone.

    ``reduction``: ``token_mean`` divides by positions; ``reference`` sums over a sample's positions and divides by
    samples, as MaTVLM does. ``result`` says which weights the stage leaves: the last, or those of the lowest held-out
    divergence.
    """

    phases: tuple[Annotated[AnyPhase, Field(discriminator="kind")], ...] = Field(min_length=1)
    divergence: Divergence = "forward_kl"
    teachers: tuple[OtherTeacher, ...] = ()
    own_weight: float = Field(1.0, gt=0)
    layer_loss: Literal["mse", "frobenius"] = "mse"
    reduction: Literal["token_mean", "reference"] = "token_mean"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(0.1, gt=0)
    dtype: Dtype = "float32"
    seed: int = 0
    validation: ValidationConfig = ValidationConfig()
    result: Literal["last", "best"] = "last"
    checkpoint_every: int = Field(200, ge=1)
    keep: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _has_best(self) -> "DistillConfig":
        if self.result == "best" and (not self.validation.fraction or self.phases[-1].kind != "distill"):
            raise ValueError("result `best` needs validation.fraction above 0 and a `distill` phase at the end")
        return self

    @model_validator(mode="after")
    def _mixes(self) -> "DistillConfig":
        names = [teacher.cache for teacher in self.teachers]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"teachers names {', '.join(twice)} more than once; give each cache once, with its weight")
        if self.teachers and self.divergence != "forward_kl":
            raise ValueError(
                f"teachers: other teachers' caches hold draws or kept tokens, which cannot give divergence "
                f"`{self.divergence}`; use `forward_kl`, or the run's own cache alone"
            )
        return self
