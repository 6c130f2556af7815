"""TinyLLaVA checkpoints on disk: which files hold which tensors, in each layout, under one set of names.

Owns the names. The layouts are the whole model (``language_model.…``), the parts in folders of their own
(``language_model/``, ``vision_tower/``, ``connector/``) and the names from before TinyLLaVA Factory (``model.…``).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.headers import tensors_of
from schemas.errors import ConfigInvalid

Layout = Literal["whole", "parts", "legacy"]
PARTS = ("language_model", "vision_tower", "connector")
PICKLED = (".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Prefix:
    """The same modules' prefix in transformers' models, in TinyLLaVA's, and in the files that transformers writes."""

    module: str
    original: str
    file: str


# Of two that fit, the first: releases of transformers differ in whether a vision tower has a ``vision_model`` inside.
PREFIXES = (
    Prefix("model.language_model.", "language_model.model.", "language_model.model."),
    Prefix("lm_head.", "language_model.lm_head.", "language_model.lm_head."),
    Prefix(
        "model.vision_tower.vision_model.", "vision_tower._vision_tower.vision_model.", "vision_tower.vision_model."
    ),
    Prefix("model.vision_tower.", "vision_tower._vision_tower.vision_model.", "vision_tower."),
    Prefix("model.multi_modal_projector.linear_1.", "connector._connector.0.", "multi_modal_projector.linear_1."),
    Prefix("model.multi_modal_projector.linear_2.", "connector._connector.2.", "multi_modal_projector.linear_2."),
)
# The prefixes of the other layouts and TinyLLaVA's for the same tensors; of several that fit, the first.
LEGACY = (
    ("model.vision_tower.vision_tower.", "vision_tower._vision_tower."),
    ("model.mm_projector.", "connector._connector."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
OF_PART = {
    "language_model": (("", "language_model."),),
    "vision_tower": (("", "vision_tower._vision_tower."),),
    "connector": (("connector.", "connector."), ("", "connector.")),
}
# Constants that older releases of transformers wrote and newer ones compute.
COMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: its name there, its type in safetensors' spelling, and its shape."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's configuration as it stands, and its tensors by TinyLLaVA's names, in the order of its files."""

    folder: Path
    layout: Layout
    config: dict[str, Any]
    tensors: dict[str, Stored]

    @property
    def made_from(self) -> str:
        """The language model that it was made from, as its configuration names it."""
        return self.config.get("llm_model_name_or_path") or "its language model"

    @property
    def aspect(self) -> str:
        """What becomes of an image's aspect ratio."""
        return self.config.get("image_aspect_ratio", "square")


def original_name(module: str) -> str:
    """TinyLLaVA's name of a tensor of transformers' Llava; the name itself where TinyLLaVA has none such."""
    return next((p.original + module.removeprefix(p.module) for p in PREFIXES if module.startswith(p.module)), module)


def file_name(module: str) -> str:
    """The name under which transformers writes a tensor of its Llava."""
    return next((p.file + module.removeprefix(p.module) for p in PREFIXES if module.startswith(p.module)), module)


def read_checkpoint(folder: Path) -> Checkpoint:
    """What the folder holds; of the weights no more than the files' headers.

    Raises:
        ConfigInvalid: it is no TinyLLaVA checkpoint, is incomplete, or has its weights pickled, quantised or as LoRA.
    """
    config = read_json(folder / "config.json")
    if (folder / "adapter_config.json").exists():
        raise ConfigInvalid(f"{folder}: is a LoRA adapter (adapter_config.json); merge it into its model first")
    if config.get("quantization_config"):
        raise ConfigInvalid(f"{folder}: config.json: the weights are quantised; import the model in full precision")
    if all((folder / part).is_dir() for part in PARTS):
        tensors = {n: t for part in PARTS for n, t in _renamed(folder / part, OF_PART[part]).items()}
        return Checkpoint(folder, "parts", _whole_config(config, folder), tensors)
    names = _stored(folder)
    if any(name.startswith("model.") for name in names):
        return Checkpoint(folder, "legacy", config, _renamed(folder, LEGACY))
    return Checkpoint(folder, "whole", config, names)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigInvalid: there is none.
    """
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigInvalid(f"{path.parent}: is no TinyLLaVA checkpoint (no {path.name})") from None
    except ValueError as error:
        raise ConfigInvalid(f"{path}: is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigInvalid(f"{path}: expected an object, got {type(found).__name__}")
    return found


def _whole_config(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The parts' own configurations, where the model's does not repeat them."""
    own = {"text_config": "language_model", "vision_config": "vision_tower"}
    missing = [key for key in own if not config.get(key)]
    return config | {key: read_json(folder / own[key] / "config.json") for key in missing}


def _renamed(folder: Path, prefixes: tuple[tuple[str, str], ...]) -> dict[str, Stored]:
    return {_rename(name, prefixes): stored for name, stored in _stored(folder).items()}


def _rename(name: str, prefixes: tuple[tuple[str, str], ...]) -> str:
    return next((new + name.removeprefix(old) for old, new in prefixes if name.startswith(old)), name)


def _stored(folder: Path) -> dict[str, Stored]:
    files = _weight_files(folder)
    found: dict[str, Stored] = {}
    for file in files:
        try:
            tensors = tensors_of(file)
        except ValueError:
            raise ConfigInvalid(f"{file}: is no safetensors file, or is cut off; copy it again") from None
        for name, (dtype, shape) in tensors.items():
            if name in found:
                raise ConfigInvalid(f"{folder}: {name} is in {found[name].file.name} and in {file.name}")
            if not name.endswith(COMPUTED):
                found[name] = Stored(file, name, dtype, shape)
    return found


def _weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files; all that its index names must be there."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigInvalid(f"{folder}: {_no_weights(folder)}")
    index = folder / "model.safetensors.index.json"
    wanted = set(read_json(index).get("weight_map", {}).values()) if index.exists() else set()
    absent = sorted(wanted - {file.name for file in files})
    if absent:
        raise ConfigInvalid(f"{folder}: {', '.join(absent)} of {index.name} is missing; copy it from the source")
    return files


def _no_weights(folder: Path) -> str:
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if not pickled:
        return "has no safetensors weights"
    return (
        f"has its weights pickled ({', '.join(pickled)}), and nothing is unpickled here. Where you trust the file, "
        'write it as safetensors and remove it: python -c "import torch; from safetensors.torch import save_file; '
        f"w = torch.load('{pickled[0]}', map_location='cpu', weights_only=True); "
        "save_file({k: v.clone() for k, v in w.items()}, 'model.safetensors')\""
    )
