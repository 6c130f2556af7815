"""The run file: every setting of a run, strictly validated.

Owns the types only; ``schemas.runfile`` reads YAML and overrides. Sections named after a stage are its identity
(fingerprinted); ``placement`` says where a stage runs and never changes what it makes.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from schemas.artifacts import ArtifactRef
from schemas.benchmarks import BenchmarkConfig
from schemas.evaluation import DistributionConfig
from schemas.layers import LayersConfig
from schemas.placement import Placement
from schemas.probes import ProbeConfig
from schemas.recipe import DistillConfig
from schemas.sections import ARTIFACT, ActivationType, Dtype, Init, Part, Positions, Section, StageSection

# Counts are stored in one byte.
MAX_DRAWS = 255


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
    """The pretrained model: a transformers folder with safetensors weights and processor files, or its name on the hub.

    ``revision`` is a commit, branch or tag of the hub's. ``aspect`` says how an image gets the side ratio that the
    vision tower takes: as the model's own ``processor`` does it, stretched (``square``), or with bars (``pad``).
    ``trust_remote_code`` runs Python from the repository, and that only of a named commit.
    """

    path: str
    revision: str | None = None
    aspect: Literal["processor", "square", "pad"] = "processor"
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _trusts_what_it_knows(self) -> "TeacherConfig":
        if self.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ValueError("trust_remote_code needs `revision` to be a commit (40 hexadecimal digits), not a branch")
        return self


# Conversation templates: the model's own, or one that TinyLLaVA's and LLaVA's checkpoints were trained with.
TemplateName = Literal["own", "phi", "llama", "qwen2_base", "qwen2_instruct", "gemma", "pretrain"]


class AnswersConfig(Section):
    """Answers that the teacher gives in place of the data's (pseudo-labels, as in MambaInLlama).

    Greedy at temperature 0, drawn otherwise; at most ``max_new_tokens`` each, turn by turn of a conversation.
    """

    max_new_tokens: int = Field(512, ge=1)
    temperature: float = Field(0.0, ge=0)
    seed: int = 0
    dtype: Dtype = "float32"


class PrepareConfig(StageSection):
    """Raw conversations to the ``samples`` table; skipped ones go to the ``rejects`` table.

    ``max_length`` counts image positions. ``answers``, where given, has the teacher answer instead of the data.
    ``truncated_images``: a file that ends too early is a bad sample, or kept as what can be read of it.
    """

    data: str
    images: str = "."
    template: TemplateName = "own"
    answers: AnswersConfig | None = None
    shard_rows: int = Field(256, ge=1, le=65536)
    max_length: int = Field(2048, ge=8)
    truncated_images: Literal["refuse", "keep"] = "refuse"
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

    ``positions`` predict a supervised token (``response``), any token that is no image's (``text``), or are all there
    are (``all``), the last one too, which no token follows.
    ``vision`` keeps the features that enter the connector, so that training needs neither pixels nor vision tower.
    """

    targets: TargetsConfig = SampledTargets()
    positions: Positions = "response"
    taps: TapsConfig = TapsConfig()
    vision: Literal["none", "bfloat16"] = "none"
    dtype: Dtype = "float32"
    seed: int = 0


class StudentConfig(Section):
    """The hybrid: which layers become Mamba-2, how their mixers start, and what trains.

    ``start`` (``name@version`` of a finished ``distill`` artifact of the same teacher) gives the trained parts of an
    earlier student; what it lacks, such as further mixers, starts as ``init`` says.
    """

    layers: LayersConfig
    init: Init = "mimic"
    train: tuple[Part, ...] = Field(("mixers", "connector"), min_length=1)
    start: str | None = Field(None, pattern=ARTIFACT)


class EvaluateConfig(StageSection):
    """Exact match by greedy generation, and held-out KL, on records in the LLaVA format.

    Teacher and student also answer ``benchmarks`` and ``probes``; ``distribution`` compares the student with the
    cached teacher. ``teacher`` (``name@version`` of a finished ``evaluate`` artifact of the same questions and teacher)
    is where the teacher's answers are taken from; without it the teacher answers anew.
    """

    data: str
    images: str = "."
    group_by: str | None = None
    limit: int | None = Field(None, ge=1)
    max_new_tokens: int = Field(16, ge=1)
    untrained: bool = True
    dtype: Dtype = "float32"
    teacher: str | None = Field(None, pattern=ARTIFACT)
    benchmarks: tuple[BenchmarkConfig, ...] = ()
    probes: tuple[ProbeConfig, ...] = ()
    distribution: DistributionConfig | None = None

    @model_validator(mode="after")
    def _asks_once(self) -> "EvaluateConfig":
        names = [*(b.task for b in self.benchmarks), *(p.kind for p in self.probes)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)}: more than once; give each benchmark and probe once")
        return self


class ExportConfig(StageSection):
    """A self-contained folder: weights in the types that they have, configuration and processor."""


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
        return ArtifactRef.named(stage, section.artifact or f"{self.name}@1")

    def earlier(self) -> ArtifactRef | None:
        """The trained student that this one starts from."""
        return ArtifactRef.named("distill", self.student.start) if self.student.start else None

    def answered(self) -> ArtifactRef | None:
        """The evaluation whose teacher's answers this one takes."""
        return ArtifactRef.named("evaluate", self.evaluate.teacher) if self.evaluate.teacher else None
