"""How the student is computed: in which types, activations kept or made again, layers compiled or not."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llava.modeling_llava import LlavaModel

from pipeline.models import attention_kinds, body, decoder
from pipeline.surgery import mixers, trained_modules
from pipeline.training.graphed import Graphed
from pipeline.vision import placed
from schemas.sections import Part

# How many programs torch keeps for one function before it leaves the rest uncompiled. All layers are one function to
# it, as they share a wrapper: decoder and tower, with and without gradients (of the input, or at all), batches of one
# and of several rows, one and all lengths. torch's own limit of 8 is under what one training has.
PROGRAMS = 64
# torch's attention as transformers calls it, under a name for which transformers makes no masks.
UNMASKED = "decant_unmasked"
AttentionInterface.register(UNMASKED, ALL_ATTENTION_FUNCTIONS["sdpa"])


def mix_precision(model: PreTrainedModel, parts: Iterable[Part], device: torch.device) -> None:
    """Trained modules, whose weights are float32, compute in bfloat16 and give the type that they were given.

    The frozen body, bfloat16 itself, stands outside: under autocast its norms would turn the residual stream into
    float32, which takes a quarter more time and half as much memory again.
    """
    for module in trained_modules(model, parts):
        module.forward = _mixed(module.forward, device.type)


def _mixed(forward: Callable[..., Any], device: str) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        with torch.autocast(device, torch.bfloat16):
            out = forward(*args, **kwargs)
        return out.to(given.dtype) if isinstance(out, Tensor) else (out[0].to(given.dtype), *out[1:])

    return wrapped


def run_ahead(model: PreTrainedModel) -> None:
    """Takes what makes the host wait for the device out of a pass over a ``Batch``'s inputs, forward and backward.

    transformers reads positions back, to see whether a row holds several sequences. Such inputs have one sequence a row
    and no mask, so that attention of all layers to all tokens before needs no mask either; other models keep theirs.
    Of a Llava it reads the number of image tokens back, and torch their places, to find the features' gradients.
    """
    config: Any = decoder(model).config
    everywhere = attention_kinds(config) == {"full_attention"} and getattr(config, "sliding_window", None) is None
    if everywhere and decoder(model)._supports_attention_backend and config._attn_implementation == "sdpa":
        config._attn_implementation = UNMASKED
    if isinstance(inner := body(model), LlavaModel):
        inner.register_forward_pre_hook(_embed, with_kwargs=True)


def _embed(
    inner: LlavaModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Embeddings with the images' features among them in the place of tokens and pixels, where there are pixels."""
    if kwargs.get("pixel_values") is None:
        return None
    ids_BL, pixels = kwargs["input_ids"], kwargs["pixel_values"]
    features = torch.cat(inner.get_image_features(pixel_values=pixels, return_dict=True).pooler_output)
    embeds = placed(inner.get_input_embeddings()(ids_BL), ids_BL == inner.config.image_token_id, features)
    return args, {**kwargs, "input_ids": None, "pixel_values": None, "inputs_embeds": embeds}


def frozen_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers that keep their attention."""
    found: Any = decoder(model).layers
    return [layer for i, layer in enumerate(found) if i not in mixers(model)]


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Frozen layers keep no activations: the backward pass runs them again from their input."""
    for layer in frozen_layers(model):
        layer.forward = _again(layer.forward)


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return wrapped


def compile_layers(model: PreTrainedModel, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compiles what is frozen: the decoder's layers around their mixers, and a Llava's vision tower.

    Layers of one kind share their programs, since they differ in nothing but their weights. Mixers run as they are: the
    graph of a replaced layer breaks at its mixer, and what comes before and after it is compiled. A program is for the
    shapes that it was made with; the second batch length makes one for every length. On CUDA the tower's forward is a
    graph besides (``Graphed``).
    """
    torch._dynamo.config.recompile_limit = max(PROGRAMS, torch._dynamo.config.recompile_limit)
    for mixer in mixers(model).values():
        mixer.forward = functools.partial(_untraced, mixer.forward)  # type: ignore[method-assign]
    layers: Any = decoder(model).layers
    # the forward alone: hooks on a layer, which record its output, stay outside
    tower, seeing = _tower(model)
    for layer in (*layers, *seeing):
        layer.forward = torch.compile(layer.forward, backend=backend)
    if seeing:
        tower.forward = Graphed(tower)


@torch.compiler.disable
def _untraced(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # one function for all mixers, which compiled code tells apart by what they call
    return forward(*args, **kwargs)


def _tower(model: PreTrainedModel) -> tuple[Any, list[nn.Module]]:
    """A vision tower that takes images of one size, and its layers; others (Qwen's) cut sequences by their data."""
    tower = getattr(body(model), "vision_tower", None)
    return tower, [] if tower is None else [m for m in tower.modules() if isinstance(m, GradientCheckpointingLayer)]
