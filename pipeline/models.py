"""Pretrained models on disk: what a folder holds, its digest, and loading it without network, pickle or remote code."""

import hashlib
import json
from pathlib import Path
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

from schemas.config import Device
from schemas.errors import ConfigInvalid

MODEL_FILES = ("config.json", "generation_config.json")
# What a folder may hold beside weights and configuration that changes how text or images are read.
PROCESSOR_SUFFIXES = (".json", ".jinja", ".txt", ".model")


def pick_device(device: Device) -> torch.device:
    """The device to compute on; ``auto`` takes CUDA where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def folder_digests(path: str) -> dict[str, str]:
    """Digests of a model folder: ``weights`` (configuration and safetensors) and ``processor`` (everything textual).

    Raises:
        ConfigInvalid: the folder has no configuration or no safetensors weights.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ConfigInvalid(f"teacher.path: {path}: is not a transformers folder (no config.json)")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ConfigInvalid(f"teacher.path: {path}: has no safetensors weights; pickled weights are not read")
    model = [folder / name for name in MODEL_FILES if (folder / name).is_file()] + weights
    skipped = {*MODEL_FILES, "training.json", "model.safetensors.index.json"}
    processor = sorted(
        p for p in folder.iterdir() if p.is_file() and p.suffix in PROCESSOR_SUFFIXES and p.name not in skipped
    )
    return {"weights": _digest(model), "processor": _digest(processor)}


def _digest(files: list[Path]) -> str:
    state = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            state.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()};".encode())
    return state.hexdigest()[:32]


def decoder_layers(path: str) -> int:
    """Number of decoder layers, read from the configuration alone (no torch model is built)."""
    config = json.loads((Path(path) / "config.json").read_text())
    text = config.get("text_config", config)
    return int(text["num_hidden_layers"])


def load_processor(path: str) -> Any:
    """The folder's processor, or tokenizer where it is a text model's."""
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    loader = AutoProcessor if hasattr(config, "vision_config") else AutoTokenizer
    return loader.from_pretrained(path, local_files_only=True)


def load_model(path: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The folder's model in eval mode without gradients, from safetensors only."""
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    loader = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = loader.from_pretrained(path, dtype=dtype, local_files_only=True, use_safetensors=True)
    return cast(PreTrainedModel, model.to(device).eval().requires_grad_(False))


def build_model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the configuration, its weights still to be loaded by the caller."""
    loader = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    return cast(PreTrainedModel, loader.from_config(config, dtype=dtype))


def body(model: PreTrainedModel) -> nn.Module:
    """Everything below the language head: its output's ``last_hidden_state`` is [B, L, D]."""
    return cast(nn.Module, model.model)


def head(model: PreTrainedModel) -> nn.Linear:
    """The language head, [D] to [V]."""
    return cast(nn.Linear, model.get_output_embeddings())


def decoder(model: PreTrainedModel) -> nn.Module:
    """The decoder that holds ``layers[i].self_attn``, alone or inside a vision-language model."""
    inner = body(model)
    return cast(nn.Module, getattr(inner, "language_model", inner))


def connector(model: PreTrainedModel) -> nn.Module | None:
    """The vision-language connector, None for a text model."""
    return cast("nn.Module | None", getattr(body(model), "multi_modal_projector", None))
