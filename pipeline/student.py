"""The hybrid student: built from the teacher's weights, and loaded again from an exported folder."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from pipeline.initialise import initialise
from pipeline.mixer import MixerDims
from pipeline.models import build_model, decoder, load_model
from pipeline.ops.opset import OpSet
from pipeline.surgery import mixers, replace_layers, trainable_names
from schemas.config import Init
from schemas.errors import ConfigInvalid
from schemas.layers import LayerPlan

HYBRID_FILE = "decant.json"


def has_bias(init: Init) -> bool:
    """Whether the mixers' projections carry biases: ``mimic`` needs them, the reference has none."""
    return init == "mimic"


def build_student(
    teacher: str, plan: LayerPlan, init: Init, seed: int, dtype: torch.dtype, device: torch.device, ops: OpSet
) -> PreTrainedModel:
    """The teacher's model with initialised mixers in the planned layers; nothing requires a gradient yet."""
    model = load_model(teacher, dtype, device)
    generator = torch.Generator().manual_seed(seed)
    for index, attention in replace_layers(model, plan, bias=has_bias(init), ops=ops).items():
        initialise(mixers(model)[index], attention, init, generator)
    return model.requires_grad_(False)


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """What an exported folder must know beyond transformers' configuration."""
    found = mixers(model)
    return {
        "format": 1,
        "layers": len(decoder(model).layers),  # type: ignore[arg-type]
        "replaced": sorted(found),
        "mixer": next(iter(found.values())).dims.to_dict(),
    }


def load_student(path: str, dtype: torch.dtype, device: torch.device, ops: OpSet) -> PreTrainedModel:
    """The exported student, in eval mode.

    Raises:
        ConfigInvalid: the folder is not an export, or its weights are not exactly the model's.
    """
    folder = Path(path)
    try:
        hybrid = json.loads((folder / HYBRID_FILE).read_text())
    except FileNotFoundError:
        raise ConfigInvalid(f"{path}: is not an exported student (no {HYBRID_FILE})") from None
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    model = build_model(config, dtype)
    plan = LayerPlan(hybrid["layers"], tuple(hybrid["replaced"]))
    dims = MixerDims(**hybrid["mixer"])
    replace_layers(model, plan, bias=dims.bias, ops=ops)
    load_exactly(model, load_file(folder / "model.safetensors"), path)
    return model.to(device).eval().requires_grad_(False)


def load_exactly(model: PreTrainedModel, weights: dict[str, Tensor], where: str) -> None:
    """Loads a full state dict; every name and shape must agree."""
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ConfigInvalid(f"{where}: the weights do not fit the model: {error}") from None


def load_trained(model: PreTrainedModel, weights: dict[str, Tensor], where: str) -> None:
    """Loads trained parameters over the teacher's; they must be exactly those that train."""
    differing = sorted(weights.keys() ^ set(trainable_names(model)))
    if differing:
        raise ConfigInvalid(f"{where}: the trained parameters are not the student's: {', '.join(differing[:5])}")
    with torch.no_grad():
        for name, value in weights.items():
            model.get_parameter(name).copy_(value)
