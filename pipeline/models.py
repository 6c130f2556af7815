"""Loads pretrained models without network, pickle or remote code, and names the parts of one."""

from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.activations import NewGELUActivation
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from schemas.errors import ConfigInvalid
from schemas.sections import Device


def pick_device(device: Device) -> torch.device:
    """The device to compute on; ``auto`` takes CUDA where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def load_processor(path: str) -> Any:
    """The folder's processor, or tokenizer where it is a text model's."""
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    loader = AutoProcessor if hasattr(config, "vision_config") else AutoTokenizer
    return loader.from_pretrained(path, local_files_only=True)


def load_model(path: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The folder's model in eval mode without gradients, from safetensors only."""
    transformers_logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    loader = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = loader.from_pretrained(path, dtype=dtype, local_files_only=True, use_safetensors=True)
    fuse_activations(model)
    return cast(PreTrainedModel, model.to(device).eval().requires_grad_(False))


def build_model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the configuration whose weights are not even initialised; the caller loads every one."""
    loader = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with no_init_weights():
        model = cast(PreTrainedModel, loader.from_config(config, dtype=dtype))
    model.tie_weights()
    fuse_activations(model)
    return model.eval().requires_grad_(False)


def fuse_activations(model: nn.Module) -> None:
    """Computes ``gelu_new`` (Phi's) by torch's kernel of the same function, in place.

    transformers spells it out in eight operations, which are a fifth of a training step's time and two fifths of its
    memory at Phi-2's size, and round eight times in bfloat16.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def body(model: PreTrainedModel) -> nn.Module:
    """Everything below the language head: its output's ``last_hidden_state`` is [B, L, D].

    Raises:
        ConfigInvalid: the model keeps it elsewhere, as GPT-2 and its time do.
    """
    inner = getattr(model, "model", None)
    if inner is None:
        raise ConfigInvalid(f"teacher.path: {type(model).__name__} has no decoder of layers with self_attn")
    return cast(nn.Module, inner)


def head(model: PreTrainedModel) -> nn.Linear:
    """The language head, [D] to [V]."""
    return cast(nn.Linear, model.get_output_embeddings())


def decoder(model: PreTrainedModel) -> nn.Module:
    """The decoder that holds ``layers[i].self_attn``, alone or inside a vision-language model."""
    inner = body(model)
    return cast(nn.Module, getattr(inner, "language_model", inner))


def connector(model: PreTrainedModel) -> nn.Module | None:
    """The vision-language connector, None for a text model.

    Llava and its kin call it ``multi_modal_projector``; in Qwen2-VL and 2.5-VL it is the vision tower's ``merger``.
    """
    inner = body(model)
    found = getattr(inner, "multi_modal_projector", None) or getattr(getattr(inner, "visual", None), "merger", None)
    return cast("nn.Module | None", found)
