"""The run file: every setting of a run, strictly validated.

Owns the types only; ``schemas.runfile`` reads YAML and overrides. Sections named after a stage are its identity
(fingerprinted); ``placement`` says where a stage runs and never changes what it makes.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from schemas.artifacts import ArtifactRef
from schemas.layers import LayersConfig

Init = Literal["matvlm", "mimic", "random"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["float32", "bfloat16"]
# Who computes the mixers' operations; `auto` takes the kernels where they are installed and the device is CUDA.
Backend = Literal["auto", "torch", "mamba-ssm"]
# What of the student trains. `norms` and `mlp` are those of the replaced layers.
Part = Literal["mixers", "connector", "norms", "mlp"]
# How activations are kept: 16 bits, or 8 with a scale a token.
ActivationType = Literal["bfloat16", "fp8_e4m3"]
Positions = Literal["response", "text", "all"]
# Counts are stored in one byte.
MAX_DRAWS = 255


class Section(BaseModel):
    """Strict and immutable: unknown keys are errors, because a misspelt setting must not silently be a default."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StageSection(Section):
    """A stage's settings; ``artifact`` (``name@version``) is where its result goes, the run's name at 1 by default."""

    artifact: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]+@[1-9][0-9]*$")


class StoreConfig(Section):
    """Where artifacts lie: a folder or a URL. Endpoint, region and profile reach S3 and its kin.

    What is not given comes from the environment, secrets always do.
    """

    url: str
    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """``store: URL`` is ``store: {url: URL}``."""
        return {"url": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _reaches(self) -> "StoreConfig":
        if (self.endpoint or self.region or self.profile) and not self.url.startswith("s3://"):
            raise ValueError(f"endpoint, region and profile are for s3:// URLs, not for {self.url}")
        if "@" in self.url.partition("://")[2].partition("/")[0]:
            raise ValueError("a URL with credentials in it; they come from the environment alone")
        return self

    @model_serializer(mode="wrap")
    def _shortest(self, whole: SerializerFunctionWrapHandler) -> str | dict[str, Any]:
        given: dict[str, Any] = {k: v for k, v in whole(self).items() if v is not None}
        return self.url if len(given) == 1 else given


class TeacherConfig(Section):
    """The pretrained model: a transformers folder with safetensors weights and processor files."""

    path: str


class PrepareConfig(StageSection):
    """Raw conversations in the LLaVA format to the ``samples`` table; skipped ones go to the ``rejects`` table."""

    data: str
    images: str = "."
    shard_rows: int = Field(256, ge=1, le=65536)
    max_length: int = Field(2048, ge=8)
    on_bad_sample: Literal["fail", "skip"] = "fail"


class SampledTargets(Section):
    """Random-sampling knowledge distillation: N draws with replacement a position (arXiv 2503.16870)."""

    kind: Literal["sampled"] = "sampled"
    draws: int = Field(50, ge=1, le=MAX_DRAWS)
    temperature: float = Field(1.0, gt=0)


class TopKTargets(Section):
    """The k most probable tokens' log-probabilities; the rest is one outcome, whose mass the log-sum-exp tells."""

    kind: Literal["top_k"]
    k: int = Field(12, ge=1, le=4096)
    temperature: float = Field(1.0, gt=0)


class FinalHiddenTargets(Section):
    """The state before the frozen head, from which the whole distribution follows; ``temperature`` is the loss's."""

    kind: Literal["final_hidden"]
    dtype: ActivationType = "bfloat16"
    temperature: float = Field(1.0, gt=0)


TargetsConfig = Annotated[SampledTargets | TopKTargets | FinalHiddenTargets, Field(discriminator="kind")]


class TapsConfig(Section):
    """Inputs and outputs of attention layers, kept for a fraction of the samples (chosen by ``sample_id``).

    With ``targets: recompute`` only the inputs are kept, and training runs the replaced attention for the outputs.
    """

    layers: Literal["replaced", "all"] | tuple[int, ...] = "replaced"
    fraction: float = Field(0.25, ge=0, le=1)
    dtype: ActivationType = "bfloat16"
    targets: Literal["stored", "recompute"] = "stored"


class CacheConfig(StageSection):
    """What the teacher leaves behind: targets of its distribution at the chosen positions, and taps.

    ``positions`` predict a supervised token (``response``), any token that is no image's (``text``), or any (``all``).
    """

    targets: TargetsConfig = SampledTargets()
    positions: Positions = "response"
    taps: TapsConfig = TapsConfig()
    dtype: Dtype = "float32"
    seed: int = 0


class StudentConfig(Section):
    """The hybrid: which layers become Mamba-2, how their mixers start, and what trains."""

    layers: LayersConfig
    init: Init = "mimic"
    train: tuple[Part, ...] = Field(("mixers", "connector"), min_length=1)


class LossWeights(Section):
    """α (KL), β (layer) and γ (cross-entropy) of the total loss."""

    kl: float = Field(1.0, ge=0)
    layer: float = Field(1.0, ge=0)
    ce: float = Field(0.0, ge=0)


class Phase(Section):
    """Optimizer steps with one learning-rate schedule: linear warm-up, constant, cosine decay to zero."""

    steps: int = Field(ge=1)
    batch: int = Field(64, ge=1)
    lr: float = Field(2e-4, gt=0)
    warmup_steps: int = Field(0, ge=0)
    decay_steps: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> "Phase":
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(f"warmup_steps + decay_steps exceed steps ({self.steps})")
        return self


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


class DistillConfig(StageSection):
    """How the student is trained. Betas, decay and clipping default to MaTVLM's."""

    phases: tuple[Annotated[AlignPhase | DistillPhase, Field(discriminator="kind")], ...] = Field(min_length=1)
    layer_loss: Literal["mse", "frobenius"] = "mse"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(0.1, gt=0)
    dtype: Dtype = "float32"
    seed: int = 0
    checkpoint_every: int = Field(200, ge=1)


class EvaluateConfig(StageSection):
    """Exact match by greedy generation, and held-out KL, on records in the LLaVA format."""

    data: str
    images: str = "."
    group_by: str | None = None
    limit: int | None = Field(None, ge=1)
    max_new_tokens: int = Field(16, ge=1)
    untrained: bool = True
    dtype: Dtype = "float32"


class ExportConfig(StageSection):
    """A self-contained folder: weights in the types that they have, configuration and processor."""


class WorkerPlacement(Section):
    """Resources of the workers of one stage; ``accelerator_type`` as Ray names it (``H100``, ``A100``, ``L4``)."""

    workers: int = Field(1, ge=1)
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)
    accelerator_type: str | None = None
    batch: int = Field(32, ge=1)


class PreparePlacement(Section):
    """CPU workers; none at all means this process, which is faster for some thousand samples than starting Ray."""

    workers: int = Field(1, ge=0)
    cpus_per_worker: float = Field(1.0, gt=0)


class CachePlacement(WorkerPlacement):
    """Teacher workers, and the CPU workers that decode images for them."""

    decoders: int = Field(2, ge=1)


class Placement(Section):
    """Where the stages run. Changing it never changes what a stage makes, beyond the hardware's rounding."""

    device: Device = "auto"
    backend: Backend = "auto"
    prepare: PreparePlacement = PreparePlacement()
    cache: CachePlacement = CachePlacement()
    distill: WorkerPlacement = WorkerPlacement()
    evaluate: WorkerPlacement = WorkerPlacement()


class RunConfig(Section):
    """One run: everything that the stages need, in one file."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    store: StoreConfig
    teacher: TeacherConfig
    prepare: PrepareConfig
    cache: CacheConfig = CacheConfig()
    student: StudentConfig
    distill: DistillConfig
    evaluate: EvaluateConfig
    export: ExportConfig = ExportConfig()
    placement: Placement = Placement()

    def ref(self, stage: str) -> ArtifactRef:
        """The artifact that a stage of this run makes."""
        section: StageSection = getattr(self, stage)
        name, _, version = (section.artifact or f"{self.name}@1").partition("@")
        return ArtifactRef(stage, name, int(version))
