"""Transformers folders on disk: what they hold, their digests, and how a new one comes to be. Imports no framework."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from schemas.errors import ConfigInvalid, StoreUnavailable

MODEL_FILES = ("config.json", "generation_config.json")
# What a folder may hold beside weights and configuration that changes how text or images are read.
PROCESSOR_SUFFIXES = (".json", ".jinja", ".txt", ".model")
NO_PROCESSOR_FILES = {*MODEL_FILES, "training.json", "model.safetensors.index.json"}
# Which token an id is: by the one file that is read where it is there, or by those of older tokenizers.
TOKENIZER = "tokenizer.json"
VOCABULARY = ("*.model", "vocab*", "merges*", "added_tokens.json")


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


def other_vocabulary(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """The files by which two folders' digests show that an id is not the same token in both; none where it is.

    Chat templates and settings of a tokenizer may differ: they say how text becomes ids, not what an id is.
    """
    names = sorted(ours.keys() | theirs.keys())
    found = [name for name in names if any(fnmatch(name, pattern) for pattern in VOCABULARY)]
    wanted = [TOKENIZER] if TOKENIZER in ours and TOKENIZER in theirs else [TOKENIZER, *found]
    return [name for name in wanted if ours.get(name) != theirs.get(name)]


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
    except (OSError, ValueError) as error:
        raise ConfigInvalid(f"teacher.path: {path}: config.json cannot be read: {error}") from None
    return config


def stored_dtype(path: str) -> str:
    """The name of the type of the folder's weights."""
    config = folder_config(path)
    found: str = config.get("dtype") or config.get("torch_dtype") or "float32"
    return found


def processor_files(path: str) -> list[Path]:
    """The files that say how text and images are read, sorted."""
    found = [p for p in Path(path).iterdir() if p.is_file() and p.suffix in PROCESSOR_SUFFIXES]
    return sorted(p for p in found if p.name not in NO_PROCESSOR_FILES)


def must_be_new(destination: Path) -> None:
    """Checks that there is nothing yet.

    Raises:
        ConfigInvalid: there is.
    """
    if destination.exists():
        raise ConfigInvalid(f"{destination}: exists already; give another folder or remove it")


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """An empty folder to write into, which becomes ``destination`` in the end; a failure leaves nothing there.

    Raises:
        ConfigInvalid: there is something already.
        StoreUnavailable: the destination cannot be written.
    """
    must_be_new(destination)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".import-") as scratch:
            folder = Path(scratch) / destination.name
            folder.mkdir()
            yield folder
            folder.rename(destination)
    except OSError as error:
        raise StoreUnavailable(f"{destination}: cannot be written: {error}") from None
