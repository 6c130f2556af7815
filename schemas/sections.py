"""What every section of a run file is made of: strictness, and the names of choices that several sections share."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

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
# How far the student's distribution is from the teacher's: KL(teacher ‖ student), KL(student ‖ teacher), or the mean of
# both models' KL to their mixture.
Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
# How workers keep trained parameters, gradients and moments: replicated, or sharded as DeepSpeed's ZeRO stages do.
Strategy = Literal["ddp", "zero1", "zero2", "zero3"]
# How a teacher is spread over several devices: whole layers on each, or a part of every matrix.
Split = Literal["layers", "tensor"]
Tracker = Literal["tensorboard", "wandb", "mlflow"]
# ``name@version`` of an artifact.
ARTIFACT = r"^[A-Za-z0-9._-]+@[1-9][0-9]*$"


class Section(BaseModel):
    """Strict and immutable: unknown keys are errors, because a misspelt setting must not silently be a default."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StageSection(Section):
    """A stage's settings; ``artifact`` (``name@version``) is where its result goes, the run's name at 1 by default."""

    artifact: str | None = Field(None, pattern=ARTIFACT)
