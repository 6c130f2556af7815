"""Transformers folders on disk: what they hold and their digests. Reads files only; imports no framework."""

import hashlib
import json
from pathlib import Path
from typing import Any

from schemas.errors import ConfigInvalid

MODEL_FILES = ("config.json", "generation_config.json")
# What a folder may hold beside weights and configuration that changes how text or images are read.
PROCESSOR_SUFFIXES = (".json", ".jinja", ".txt", ".model")
NO_PROCESSOR_FILES = {*MODEL_FILES, "training.json", "model.safetensors.index.json"}


def folder_digests(path: str) -> dict[str, str]:
    """Digests of a model folder: ``weights`` (configuration and safetensors) and ``processor`` (everything textual).

    Raises:
        ConfigInvalid: the folder has no configuration or no safetensors weights.
    """
    folder = Path(path)
    folder_config(path)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ConfigInvalid(f"teacher.path: {path}: has no safetensors weights; pickled weights are not read")
    model = [folder / name for name in MODEL_FILES if (folder / name).is_file()] + weights
    return {"weights": _digest(model), "processor": _digest(processor_files(path))}


def _digest(files: list[Path]) -> str:
    state = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            state.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()};".encode())
    return state.hexdigest()[:32]


def folder_config(path: str) -> dict[str, Any]:
    """The model's configuration as it stands on disk.

    Raises:
        ConfigInvalid: there is none.
    """
    try:
        config: dict[str, Any] = json.loads((Path(path) / "config.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigInvalid(f"teacher.path: {path}: is not a transformers folder (no config.json)") from None
    return config


def text_config(path: str) -> dict[str, Any]:
    """The decoder's part of the configuration, of a vision-language or a text model."""
    config = folder_config(path)
    part: dict[str, Any] = config.get("text_config", config)
    return part


def stored_dtype(path: str) -> str:
    """The name of the type of the folder's weights."""
    config = folder_config(path)
    found: str = config.get("dtype") or config.get("torch_dtype") or "float32"
    return found


def processor_files(path: str) -> list[Path]:
    """The files that say how text and images are read, sorted."""
    found = [p for p in Path(path).iterdir() if p.is_file() and p.suffix in PROCESSOR_SUFFIXES]
    return sorted(p for p in found if p.name not in NO_PROCESSOR_FILES)
