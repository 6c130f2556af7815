"""What a hybrid says about itself wherever it is written down: exported folders and trained checkpoints."""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from schemas.errors import ConfigInvalid
from schemas.sections import Backend, Part

FORMAT = 1
# No transformers class has this name: stock loading must fail, not leave the mixers out and go on.
MODEL_TYPE = "decant_hybrid"
# Where a configuration says what the hybrid is.
RECORD = "decant"


@dataclass(frozen=True)
class MixerDims:
    """Sizes of one mixer, all counts.

    ``bias`` adds biases to the input and output projections, ``qk_norm`` a norm a head to C and B (from the
    attention's query and key norms).

    Raises:
        ConfigInvalid: the heads cannot share the key-value heads evenly.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    bias: bool
    qk_norm: bool = False
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if min(self.hidden, self.heads, self.kv_heads, self.head_dim) < 1 or self.heads % self.kv_heads:
            raise ConfigInvalid(
                f"mixer: {self.heads} heads cannot share {self.kv_heads} key-value heads evenly "
                f"(head dimension {self.head_dim}, hidden size {self.hidden})"
            )

    @property
    def inner(self) -> int:
        """Width of z, C and the output of the scan."""
        return self.heads * self.head_dim

    @property
    def compact(self) -> int:
        """Width of x and of B before they are repeated."""
        return self.kv_heads * self.head_dim

    @property
    def rows(self) -> dict[str, slice]:
        """The row blocks of ``in_proj``: z, x, B, C, dt."""
        sizes = {"z": self.inner, "x": self.compact, "B": self.compact, "C": self.inner, "dt": self.heads}
        blocks, at = {}, 0
        for name, size in sizes.items():
            blocks[name] = slice(at, at + size)
            at += size
        return blocks

    @property
    def width(self) -> int:
        """Rows of ``in_proj``."""
        return self.rows["dt"].stop


class HybridRecord(BaseModel):
    """The plan, the mixers, what computed them and whose frozen weights they belong to.

    ``base`` is the base model's type, ``layers`` the decoder's depth, ``mixers`` the sizes of each replaced layer's
    mixer, ``backend`` what computed them in training, ``teacher`` the digests of the teacher's weights and files,
    ``head_bias`` whether the language head has a bias that the stock class lacks, ``trained`` what a checkpoint of
    trained tensors holds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = Field(FORMAT, ge=1, le=FORMAT)
    base: str
    layers: int = Field(ge=1)
    mixers: dict[int, MixerDims]
    backend: Backend
    teacher: dict[str, str]
    head_bias: bool = False
    trained: tuple[Part, ...] = ()

    @property
    def replaced(self) -> tuple[int, ...]:
        """The replaced layers, in order."""
        return tuple(sorted(self.mixers))

    @property
    def bias(self) -> bool:
        """Whether the mixers' projections have biases."""
        return any(dims.bias for dims in self.mixers.values())
