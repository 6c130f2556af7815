"""How much a teacher computes: its size from the configuration alone, and the FLOPs of one pass over a data set."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.models import body, build_model, connector, decoder, head, load_config
from pipeline.planning.lengths import Lengths
from pipeline.vision import feature_width
from schemas.config import TeacherConfig


@dataclass(frozen=True)
class ModelSize:
    """What of a model's size counts: parameters by part, and what attention needs besides.

    ``attention`` is heads × head dimension; ``tile`` the patches that attend to each other in the vision tower, 0 where
    that is not one fixed image (windows are small beside the rest); ``merge`` the patches that make one image token;
    ``features`` the width of the vision features that a cache can keep, 0 where it cannot.
    """

    parameters: int
    decoder: int
    layers: int
    attention: int
    hidden: int
    vocabulary: int
    vision: int = 0
    vision_layers: int = 0
    vision_hidden: int = 0
    tile: int = 0
    merge: int = 1
    connector: int = 0
    features: int = 0

    def pass_flops(self, lengths: Lengths, positions: float) -> float:
        """FLOPs of one forward over the data set, its head applied at ``positions`` positions.

        Two a parameter and token; causal attention adds 2 T² (scores and values, half of each), full attention 4 T².
        """
        return (
            2.0 * self.decoder * lengths.tokens
            + 2.0 * lengths.squared_tokens * self.attention * self.layers
            + 2.0 * self.hidden * self.vocabulary * positions
            + self.vision_flops(lengths)
            + 2.0 * self.connector * lengths.image_tokens
        )

    def vision_flops(self, lengths: Lengths) -> float:
        """FLOPs of the vision tower in one pass."""
        patches = lengths.image_tokens * self.merge
        return 2.0 * self.vision * patches + 4.0 * patches * self.tile * self.vision_hidden * self.vision_layers


def model_size(teacher: str | TeacherConfig) -> ModelSize:
    """The size of a teacher; reads its configuration and no weights."""
    config = load_config(teacher)
    with torch.device("meta"):
        model = build_model(config, torch.float32)
    layers, joint = decoder(model), connector(model)
    text, out = config.get_text_config(), head(model)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    joined = _count(joint) if joint else 0
    return ModelSize(
        parameters=_count(model),
        decoder=_count(layers.layers),  # type: ignore[arg-type]
        layers=text.num_hidden_layers,
        attention=text.num_attention_heads * head_dim,
        hidden=out.in_features,
        vocabulary=out.out_features,
        vision=_count(body(model)) - _count(layers) - joined,
        connector=joined,
        features=feature_width(config) or 0,
        **_vision(getattr(config, "vision_config", None)),
    )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _vision(config: Any) -> dict[str, int]:
    """The vision tower's layers, width, fixed number of patches and patches an image token."""
    if config is None:
        return {}
    size, patch = getattr(config, "image_size", None), config.patch_size
    return {
        "vision_layers": getattr(config, "num_hidden_layers", None) or config.depth,
        "vision_hidden": config.hidden_size,
        "tile": (size // patch) ** 2 if size else 0,
        "merge": getattr(config, "spatial_merge_size", 1) ** 2,
    }
