"""Turns a decoder into a hybrid: which attention modules are replaced, by what, and what of the result trains.

The only place that replaces modules and that decides which parameters train.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.mixer import Mamba2Mixer, MixerDims
from pipeline.models import connector, decoder
from pipeline.ops.opset import OpSet
from schemas.errors import ConfigInvalid
from schemas.layers import LayerPlan

LINEAR, FULL = "linear_attention", "full_attention"


def attention_projections(attention: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
    """Query, key, value and output projection of an attention module.

    Raises:
        ConfigInvalid: the module keeps them elsewhere, so that a mixer cannot start from them.
    """
    output = getattr(attention, "o_proj", None) or getattr(attention, "dense", None)
    found = [*(getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj")), output]
    linear = [p for p in found if isinstance(p, nn.Linear)]
    if len(linear) != len(found):
        raise ConfigInvalid(f"teacher.path: {type(attention).__name__} has no separate q, k, v and output projections")
    return linear[0], linear[1], linear[2], linear[3]


def mixer_dims(attention: nn.Module, *, bias: bool) -> MixerDims:
    """The sizes of the mixer that replaces an attention module.

    Raises:
        ConfigInvalid: the module normalises queries and keys, which a mixer does not.
    """
    if any(getattr(attention, name, None) is not None for name in ("q_norm", "k_norm", "q_layernorm", "k_layernorm")):
        raise ConfigInvalid(f"teacher.path: {type(attention).__name__} normalises queries and keys; not supported")
    q, k, _, o = attention_projections(attention)
    head_dim = int(attention.head_dim)  # type: ignore[arg-type]
    return MixerDims(o.out_features, q.out_features // head_dim, k.out_features // head_dim, head_dim, bias)


def replace_layers(model: PreTrainedModel, plan: LayerPlan, *, bias: bool, ops: OpSet) -> dict[int, nn.Module]:
    """Puts uninitialised mixers into the planned layers, in place; returns the attention modules that they replace."""
    inner = decoder(model)
    removed = {}
    for index in plan.replaced:
        layer: Any = inner.layers[index]  # type: ignore[index]
        attention = layer.self_attn
        weight = attention_projections(attention)[0].weight
        with torch.device(weight.device):
            mixer = Mamba2Mixer(mixer_dims(attention, bias=bias), index).to(weight.dtype)
        mixer.use(ops)
        removed[index] = attention
        layer.self_attn = mixer
    mark_layers(inner, plan)
    return removed


def mark_layers(inner: nn.Module, plan: LayerPlan) -> None:
    """Tells transformers' caches which layers are recurrent, and the mixers which positions are padding."""
    types = [LINEAR if i in plan.replaced else FULL for i in range(plan.total)]
    inner.config.layer_types = types  # type: ignore[union-attr]
    inner.register_forward_pre_hook(_pass_padding_mask, with_kwargs=True)


def _pass_padding_mask(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The decoder's 2-D attention mask reaches every layer as ``padding_mask`` (layers get the decoder's keywords)."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        kwargs["padding_mask"] = mask
    return args, kwargs


def mixers(model: PreTrainedModel) -> dict[int, Mamba2Mixer]:
    """The model's mixers by layer."""
    layers: Any = decoder(model).layers
    return {i: layer.self_attn for i, layer in enumerate(layers) if isinstance(layer.self_attn, Mamba2Mixer)}


def trainable_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the parameters that distillation may change: mixers and connector, in the model's order."""
    parts = [*mixers(model).values(), connector(model)]
    chosen = {id(p) for part in parts if part is not None for p in part.parameters()}
    return tuple(name for name, p in model.named_parameters() if id(p) in chosen)
