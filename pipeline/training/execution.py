"""How the student is computed: in which types, activations kept or made again, layers compiled or not."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pipeline.models import decoder
from pipeline.surgery import mixers, trained_modules
from schemas.sections import Part


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


def compile_layers(model: PreTrainedModel) -> None:
    """Frozen layers are compiled, one program for all: they differ in nothing but their weights."""
    for layer in frozen_layers(model):
        layer.compile()
