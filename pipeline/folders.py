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
    """Digests of a model folder: one of all its ``weights``, and one of each file of its configuration and processor.

    Raises:
        ConfigInvalid: the folder has no configuration or no safetensors weights.
    """
    processor = processor_digests(path)
    weights = sorted(Path(path).glob("*.safetensors"))
    if not weights:
        raise ConfigInvalid(f"teacher.path: {path}: has no safetensors weights; pickled weights are not read")
    model = [Path(path) / name for name in MODEL_FILES if (Path(path) / name).is_file()]
    return {"weights": _digest(weights), **_digests(model), **processor}


def processor_digests(path: str) -> dict[str, str]:
    """Digests of the files that say how text and images are read, by name.

    Raises:
        ConfigInvalid: the folder has no configuration.
    """
    folder_config(path)
    return _digests(processor_files(path))


def _digests(files: list[Path]) -> dict[str, str]:
    return {path.name: _digest([path]) for path in files}


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
