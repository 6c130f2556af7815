"""Turns a decoder into a hybrid: which attention modules are replaced, by what, and what of the result trains.

The only place that replaces modules and that decides which parameters train.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache
from transformers.masking_utils import find_packed_sequence_indices

from pipeline.mixer import Mamba2Mixer
from pipeline.models import connector, decoder
from pipeline.ops.opset import OpSet
from schemas.errors import ConfigInvalid
from schemas.hybrid import MixerDims
from schemas.layers import LayerPlan
from schemas.sections import Part

DEFAULT_PARTS: tuple[Part, ...] = ("mixers", "connector")


def attention_projections(attention: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
    """Query, key, value and output projection of an attention module.

    Raises:
        ConfigInvalid: the module keeps them elsewhere or in other sizes, so that a mixer cannot start from them.
    """
    output = getattr(attention, "o_proj", None) or getattr(attention, "dense", None)
    found = [*(getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj")), output]
    linear = [p for p in found if isinstance(p, nn.Linear)]
    if len(linear) != len(found):
        raise ConfigInvalid(f"teacher.path: {type(attention).__name__} has no separate q, k, v and output projections")
    q, k, v, o = linear
    if k.out_features != v.out_features or q.out_features != o.in_features:
        raise ConfigInvalid(
            f"teacher.path: {type(attention).__name__} projects to {q.out_features} (query), {k.out_features} (key), "
            f"{v.out_features} (value) and from {o.in_features} (output); a mixer needs keys and values, and queries "
            "and outputs, of one size"
        )
    return q, k, v, o


def mixer_dims(attention: nn.Module, *, bias: bool) -> MixerDims:
    """The sizes of the mixer that replaces an attention module.

    Raises:
        ConfigInvalid: its heads do not divide, or its norms are of a kind that a mixer has not.
    """
    q, k, _, o = attention_projections(attention)
    head_dim = int(attention.head_dim)  # type: ignore[arg-type]
    if q.out_features % head_dim or k.out_features % head_dim:
        raise ConfigInvalid(
            f"teacher.path: {type(attention).__name__} projects to {q.out_features} and {k.out_features}, which heads "
            f"of {head_dim} do not divide"
        )
    heads, kv_heads = q.out_features // head_dim, k.out_features // head_dim
    return MixerDims(o.out_features, heads, kv_heads, head_dim, bias, qk_norm=qk_gains(attention, head_dim) is not None)


@torch.no_grad()
def qk_gains(attention: nn.Module, head_dim: int) -> tuple[Tensor, Tensor] | None:
    """What the query and key norms multiply a normed head by, each [head_dim]; None where there are no norms.

    Raises:
        ConfigInvalid: they are no root-mean-square norms over single heads.
    """
    names = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")
    norms = [found for name in names if (found := getattr(attention, name, None)) is not None]
    if not norms:
        return None
    gains = [_rms_gain(norm, head_dim) for norm in norms]
    if len(gains) != 2 or gains[0] is None or gains[1] is None:
        kinds = ", ".join(sorted({type(n).__name__ for n in norms}))
        raise ConfigInvalid(
            f"teacher.path: {type(attention).__name__} normalises queries and keys by {kinds}; "
            "a mixer has root-mean-square norms over single heads only"
        )
    return gains[0], gains[1]


def _rms_gain(norm: nn.Module, head_dim: int) -> Tensor | None:
    """The gain of a root-mean-square norm, found by using it; None if it is something else."""
    if [p.shape for p in norm.parameters()] != [(head_dim,)]:
        return None
    if next(norm.parameters()).is_meta:  # only the kind can be found out
        norm = copy.deepcopy(norm).to_empty(device="cpu")
        nn.init.ones_(next(norm.parameters()))
    # large, so that the norm's epsilon does not count, and of unequal signs, so that a mean would be seen
    probe = torch.full_like(next(norm.parameters()), 1024.0)
    gain: Tensor = norm(probe).float()
    probe[::2] *= -1
    flipped = norm(probe).float()
    flipped[::2] *= -1
    return gain if torch.equal(gain, flipped) else None


def refuse_unfit(model: PreTrainedModel, plan: LayerPlan) -> None:
    """Checks that a mixer can stand in for each planned layer's attention.

    Raises:
        ConfigInvalid: it cannot; names every such layer with the reason, and the layers that could be replaced.
    """
    layers: Any = getattr(decoder(model), "layers", None)
    if layers is None or model.config.is_encoder_decoder:
        raise ConfigInvalid(f"teacher.path: {type(model).__name__} has no decoder of layers with self_attn")
    if len(layers) != plan.total:
        raise ConfigInvalid(f"student.layers: made for {plan.total} layers; the decoder has {len(layers)}")
    config = decoder(model).config
    reasons = {i: reason for i in range(plan.total) if (reason := _obstacle(layers[i], i, config))}
    wrong = [f"layer {i} ({reasons[i]})" for i in plan.replaced if i in reasons]
    if wrong:
        fit = [i for i in range(plan.total) if i not in reasons]
        raise ConfigInvalid(f"student.layers: cannot replace {'; '.join(wrong)}. Layers that can be replaced: {fit}")


def _obstacle(layer: nn.Module, index: int, config: Any) -> str | None:
    """Why the layer's attention cannot be replaced, None if it can."""
    attention = getattr(layer, "self_attn", None)
    if attention is None:
        crossing = "cross_attn" in dict(layer.named_children())
        kind = "cross-attention: it reads another sequence" if crossing else "no self_attn"
        return f"{type(layer).__name__}: {kind}"
    name = type(attention).__name__
    if isinstance(attention, Mamba2Mixer):
        return "already a Mamba-2 mixer"
    if not getattr(attention, "is_causal", True):
        return f"{name} is an encoder's: it attends in both directions"
    if getattr(attention, "is_kv_shared_layer", False):
        return f"{name} takes keys and values from another layer"
    window, context = _window(attention, index, config), config.max_position_embeddings
    if window is not None and window < context:
        return (
            f"{name} sees the last {window} of up to {context} tokens only; a recurrence over the whole text would be "
            "something else. If the model is used within its window, set sliding_window to null in its config.json"
        )
    try:
        mixer_dims(attention, bias=False)
    except ConfigInvalid as error:
        return str(error).removeprefix("teacher.path: ")
    return None


def _window(attention: nn.Module, index: int, config: Any) -> int | None:
    """Tokens that the attention sees, None for all of them."""
    types = getattr(config, "layer_types", None)
    if types is not None and types[index] == "chunked_attention":
        return int(config.attention_chunk_size)
    # layers that differ hold their own; Mistral's do not, and all follow the configuration
    window: Any = getattr(attention, "sliding_window", getattr(config, "sliding_window", None) if not types else None)
    return None if window is None else int(window)


def replace_layers(model: PreTrainedModel, plan: LayerPlan, *, bias: bool, ops: OpSet) -> dict[int, nn.Module]:
    """Puts uninitialised mixers into the planned layers, in place; returns the attention modules that they replace.

    Raises:
        ConfigInvalid: a planned layer cannot be replaced. The model is as it was.
    """
    refuse_unfit(model, plan)
    inner = decoder(model)
    removed = {}
    for index in plan.replaced:
        layer: Any = inner.layers[index]  # type: ignore[index]
        attention = layer.self_attn
        weight = attention_projections(attention)[0].weight
        with torch.device(weight.device):
            mixer = Mamba2Mixer(mixer_dims(attention, bias=bias), index).to(weight.dtype)
        mixer.use(ops)
        mixer.train(attention.training)
        removed[index] = attention
        layer.self_attn = mixer
    if removed:
        inner.register_forward_pre_hook(_tell_mixers, with_kwargs=True)
        model._is_stateful = True  # what transformers calls a model whose cache cannot go back
    return removed


def _tell_mixers(
    inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Layers get the decoder's keywords, so what the mixers must know about padding and packing goes there.

    Raises:
        ConfigInvalid: the caller prepared masks of its own, from which that cannot be told.
    """
    mask, positions, cache = (kwargs.get(name) for name in ("attention_mask", "position_ids", "past_key_values"))
    if isinstance(cache, StaticCache):  # for which transformers prepares the masks
        raise ConfigInvalid(f"{type(inner).__name__}: is a hybrid and got a static cache; use the dynamic cache")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise ConfigInvalid(f"{type(inner).__name__}: is a hybrid, which needs the 2-D attention mask of padding")
        kwargs["padding_mask"] = mask
    elif positions is not None and cache is None:
        # as transformers' own masks do: without mask and cache, positions that start again mean packed sequences
        text = positions[0] if positions.dim() == 3 and positions.shape[0] == 4 else positions
        if text.dim() == 2:
            kwargs.setdefault("seq_idx", find_packed_sequence_indices(text))
    return args, kwargs


def mixers(model: PreTrainedModel) -> dict[int, Mamba2Mixer]:
    """The model's mixers by layer."""
    layers: Any = decoder(model).layers
    found = {i: getattr(layer, "self_attn", None) for i, layer in enumerate(layers)}
    return {i: module for i, module in found.items() if isinstance(module, Mamba2Mixer)}


def trainable_names(model: PreTrainedModel, parts: Iterable[Part] = DEFAULT_PARTS) -> tuple[str, ...]:
    """Names of the parameters that distillation may change, in the model's order.

    ``mixers`` and ``connector``, and of the replaced layers the ``norms`` and the ``mlp``.
    """
    chosen = {id(p) for module in trained_modules(model, parts) for p in module.parameters()}
    return tuple(name for name, p in model.named_parameters() if id(p) in chosen)


def widen_trained(model: PreTrainedModel, parts: Iterable[Part] = DEFAULT_PARTS) -> None:
    """Puts the parameters that distillation may change into float32: small steps do not survive eight bits."""
    for name in trainable_names(model, parts):
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.float()


def trained_modules(model: PreTrainedModel, parts: Iterable[Part]) -> list[nn.Module]:
    """The modules whose parameters distillation may change."""
    return [module for part in parts for module in _modules(model, part)]


def _modules(model: PreTrainedModel, part: Part) -> list[nn.Module]:
    found = mixers(model)
    if part == "mixers":
        return list(found.values())
    if part == "connector":
        projector = connector(model)
        return [] if projector is None else [projector]
    layers: Any = decoder(model).layers
    children = [child for i in found for child in layers[i].named_children()]
    if part == "mlp":
        return [module for name, module in children if name == "mlp"]
    return [module for _, module in children if "norm" in type(module).__name__.lower()]
