"""Which decoder layers keep attention and which become Mamba-2: the setting and the plan that it resolves to."""

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from schemas.errors import ConfigInvalid

Placement = Literal["even", "start", "middle", "end"]

# MaTVLM's published list for 12.5 % of 32 layers has stride 6, which no formula for an even spread gives.
MATVLM_LISTS = {(4, 32): (0, 6, 12, 18)}


class LayersConfig(BaseModel):
    """The replaced layers, either as a share with a placement or as an explicit list."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ratio: float | None = Field(None, gt=0, le=1)
    placement: Placement = "even"
    list: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> "LayersConfig":
        if (self.ratio is None) == (self.list is None):
            raise ValueError("give either `ratio` or `list`")
        return self


@dataclass(frozen=True)
class LayerPlan:
    """The resolved choice: ``replaced`` (sorted indices) of ``total`` decoder layers become Mamba-2 mixers."""

    total: int
    replaced: tuple[int, ...]

    @property
    def kept(self) -> tuple[int, ...]:
        """The layers that keep their attention."""
        return tuple(i for i in range(self.total) if i not in self.replaced)


def plan_layers(config: LayersConfig, total: int) -> LayerPlan:
    """Resolves the setting for a decoder of ``total`` layers.

    ``even`` spreads k layers with stride total/k from layer 0 on, as MaTVLM does; its own lists hold for 32 layers.

    Raises:
        ConfigInvalid: the setting replaces no layer, or names one that the decoder does not have.
    """
    if config.list is not None:
        return LayerPlan(total, _checked_list(config.list, total))
    assert config.ratio is not None
    count = round(config.ratio * total)
    if count < 1:
        raise ConfigInvalid(
            f"student.layers.ratio: {config.ratio:g} of {total} decoder layers replaces no layer; "
            f"the smallest ratio that replaces one is {1 / total:g}"
        )
    starts = {"start": 0, "middle": (total - count) // 2, "end": total - count}
    if config.placement != "even":
        start = starts[config.placement]
        return LayerPlan(total, tuple(range(start, start + count)))
    even = tuple(i * total // count for i in range(count))
    return LayerPlan(total, MATVLM_LISTS.get((count, total), even))


def _checked_list(layers: tuple[int, ...], total: int) -> tuple[int, ...]:
    if not layers:
        raise ConfigInvalid("student.layers.list: an empty list replaces no layer; name at least one")
    bad = [i for i in layers if not 0 <= i < total]
    if bad or len(set(layers)) != len(layers):
        raise ConfigInvalid(
            f"student.layers.list: {list(layers)} must be distinct layers from 0 to {total - 1} of this decoder"
        )
    return tuple(sorted(layers))
