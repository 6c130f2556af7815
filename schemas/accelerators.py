"""The table of accelerators and storage that ``plan`` computes with: rates and prices, which users edit."""

from pathlib import Path

from pydantic import Field

from schemas.errors import ConfigInvalid
from schemas.runfile import read_mapping, validated
from schemas.sections import Dtype, Section


class Accelerator(Section):
    """One device: peak dense rates (10^12 FLOP/s) by type, the share a teacher's forward reaches, memory and price."""

    bfloat16_tflops: float = Field(gt=0)
    float32_tflops: float = Field(gt=0)
    effective: float = Field(gt=0, le=1)
    memory_gib: float = Field(gt=0)
    dollars_per_hour: float = Field(gt=0)

    def flops(self, dtype: Dtype) -> float:
        """FLOP/s that a teacher's forward reaches."""
        return 1e12 * self.effective * (self.bfloat16_tflops if dtype == "bfloat16" else self.float32_tflops)


class Storage(Section):
    """Where the cache lies: its price, what one node reads of it, and the node's accelerators, which share that."""

    dollars_per_gb_month: float = Field(ge=0)
    read_gb_per_second: float = Field(gt=0)
    accelerators_per_node: int = Field(ge=1)

    @property
    def read_rate(self) -> float:
        """Bytes a second that each accelerator can read."""
        return 1e9 * self.read_gb_per_second / self.accelerators_per_node


class Rates(Section):
    """The whole file."""

    accelerators: dict[str, Accelerator] = Field(min_length=1)
    storage: Storage

    def accelerator(self, name: str) -> Accelerator:
        """The named accelerator.

        Raises:
            ConfigInvalid: there is none of that name; lists those that there are.
        """
        if name not in self.accelerators:
            known = ", ".join(self.accelerators)
            raise ConfigInvalid(
                f"--accelerator {name}: is not in the table, which has {known}; "
                "copy jobs/configs/accelerators.yaml, add it, and give the copy with --accelerators"
            )
        return self.accelerators[name]


def load_rates(path: str | Path) -> Rates:
    """The validated table of a YAML file.

    Raises:
        ConfigInvalid: the file is missing, or a field is unknown, missing or out of range.
    """
    return validated(Rates, read_mapping(path, "table of accelerators"), path)
