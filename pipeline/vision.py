"""Cached vision features: what a frozen vision tower hands to the connector, captured, read, and fed to a student.

For Llava, whose connector takes one layer's features of each image, all images of one size. What is kept is the
connector's input, after the choice of layer and the drop of the class token, so that whoever trains the connector needs
neither pixels nor tower.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pipeline.activations import decode_activation
from pipeline.hub import as_teacher
from pipeline.models import body, load_config
from schemas.config import TeacherConfig
from schemas.errors import ConfigInvalid
from schemas.tables import VISION


def feature_width(config: Any) -> int | None:
    """The width of a model's cacheable features by its configuration, None where it has none."""
    return None if _obstacle(config) else int(config.vision_config.hidden_size)


def refuse_other_towers(teacher: str | TeacherConfig) -> None:
    """Checks from a model folder's configuration that its vision features can be cached.

    Raises:
        ConfigInvalid: they cannot; says why.
    """
    reason = _obstacle(load_config(teacher))
    if reason:
        raise ConfigInvalid(
            f"cache.vision: {as_teacher(teacher).path}: {reason}; cached features need a Llava whose connector takes "
            "one layer's features of images of one size: use `none`"
        )


def _obstacle(config: Any) -> str | None:
    """Why the features cannot be cached, None if they can."""
    if config.model_type != "llava":
        return f"is a {config.model_type}"
    if not isinstance(config.vision_feature_layer, int):
        return f"takes features of the layers {list(config.vision_feature_layer)}"
    if config.vision_config.model_type == "pixtral":
        return "has a tower (pixtral) for images of any size"
    return None


@contextmanager
def recorded_features(projector: nn.Module | None) -> Iterator[list[Tensor]]:
    """While open, each call of the connector leaves its input [images, patches, width]; nothing without a connector."""
    found: list[Tensor] = []
    if projector is None:
        yield found
        return
    handle = projector.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    try:
        yield found
    finally:
        handle.remove()


def features_of(row: Mapping[str, Any]) -> Tensor | None:
    """The features bfloat16[patches, width] of a row's images, the shard's own memory; None without an image."""
    return decode_activation(VISION, row, row["patches"], "bfloat16").values if row["patches"] else None


def vision_inputs(rows: Sequence[Mapping[str, Any]], patches: int) -> dict[str, Tensor]:
    """What a model that is fed with features takes: ``pixel_values`` bfloat16[images, patches, width], if any.

    ``patches`` is the number of an image's features, of which a row has those of all its images.
    """
    found = [features for row in rows if (features := features_of(row)) is not None]
    return {"pixel_values": torch.cat(found).unflatten(0, (-1, patches))} if found else {}


def placed(embeds_BLD: Tensor, places_BL: Tensor, features_ND: Tensor) -> Tensor:
    """The embeddings with the features, in their order, at N places; the device asserts that there are so many.

    As ``masked_scatter``, but the host waits for the device in neither pass.
    """
    count = len(features_ND)
    torch._assert_async(places_BL.sum() == count, "the image tokens are not as many as the image features")
    where_N = torch.nonzero_static(places_BL.flatten(), size=count)[:, 0]
    flat = embeds_BLD.flatten(0, 1).index_copy(0, where_N, features_ND.to(embeds_BLD.dtype))
    return flat.view_as(embeds_BLD)


class _Fed(nn.Module):
    """Stands where the vision tower stood: hands what it is given on as the state of the layer that the model takes."""

    def __init__(self, layer: int, dropped: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dropped, self.dtype = layer, dropped, dtype

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        state = F.pad(pixel_values.to(self.dtype), (0, 0, self.dropped, 0))
        return BaseModelOutputWithPooling(last_hidden_state=state, hidden_states={self.layer: state})


def feed_features(model: PreTrainedModel) -> None:
    """Takes the vision tower out, in place: ``pixel_values`` are from now on features [images, patches, width].

    The model's own code hands them to the connector unchanged, in the type that the tower computed in.

    Raises:
        ConfigInvalid: the model is none whose features can be cached.
    """
    reason = _obstacle(model.config)
    if reason:
        raise ConfigInvalid(f"{type(model).__name__}: cannot be fed with vision features: it {reason}")
    inner: Any = body(model)
    # `default` drops the class token, which comes first
    dropped = 1 if model.config.vision_feature_select_strategy == "default" else 0
    inner.vision_tower = _Fed(model.config.vision_feature_layer, dropped, inner.vision_tower.dtype)
