"""Loads checkpoints that MaTVLM's own code wrote: TinyLLaVA's names, with ``layers.{i}.mamba`` in replaced layers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from pipeline.folders import folder_digests
from pipeline.models import HEAD_BIAS, add_head_bias, decoder, head, load_model
from pipeline.ops.backends import resolve
from pipeline.student import load_exactly, mark
from pipeline.surgery import mixers, replace_layers
from pipeline.tinyllava.layout import original_name
from schemas.errors import ConfigInvalid
from schemas.layers import LayerPlan
from schemas.sections import Backend

CONFIG_FILE = "mamba_config.json"


def load_matvlm(
    checkpoint: str | Path,
    teacher: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    backend: Backend = "auto",
) -> PreTrainedModel:
    """The hybrid of a MaTVLM checkpoint, in eval mode, on the transformers folder of the model that it came from.

    ``checkpoint`` holds safetensors shards and ``mamba_config.json``. Every tensor comes from it, the language head's
    bias included; ``teacher`` gives configuration and identity.

    Raises:
        ConfigInvalid: the folder is no such checkpoint, or its tensors are not exactly the hybrid's.
        BackendUnavailable: the named backend cannot be used here.
    """
    folder, device = Path(checkpoint), device or torch.device("cpu")
    settings, digests = _settings(folder), folder_digests(teacher)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigInvalid(f"{checkpoint}: has no safetensors weights; pickled weights are not read")
    model = load_model(teacher, dtype, device)
    ops = resolve(backend, device)
    total = len(decoder(model).layers)  # type: ignore[arg-type]
    if settings["n_layer"] != total:
        raise ConfigInvalid(f"{checkpoint}: is of {settings['n_layer']} layers, the teacher {teacher} has {total}")
    replaced = tuple(i for i in range(total) if i not in set(settings["attn_layers"]))
    replace_layers(model, LayerPlan(total, replaced), bias=settings.get("is_bias", False), ops=ops)
    _check_sizes(model, settings, str(checkpoint))
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    if original_name(HEAD_BIAS) in weights and head(model).bias is None:
        add_head_bias(model)
    mark(model, ops.backend, digests)
    names = {original_name(place): place for place in model.state_dict()}
    load_exactly(model, {names.get(n.replace(".mamba.", ".self_attn."), n): t for n, t in weights.items()}, str(folder))
    return model.requires_grad_(False)


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text())
    except FileNotFoundError:
        raise ConfigInvalid(f"{folder}: is no MaTVLM checkpoint (no {CONFIG_FILE})") from None
    if not {"n_layer", "attn_layers", "d_inner", "d_xb", "ssm_cfg"} <= settings.keys():
        raise ConfigInvalid(f"{folder}: {CONFIG_FILE} does not say n_layer, attn_layers, d_inner, d_xb and ssm_cfg")
    return settings


def _check_sizes(model: PreTrainedModel, settings: dict[str, Any], where: str) -> None:
    said = settings["d_inner"], settings["d_xb"], settings["ssm_cfg"]["ngroups"], settings["ssm_cfg"]["d_state"]
    for index, mixer in mixers(model).items():
        dims = mixer.dims
        own = dims.inner, dims.compact, dims.heads, dims.head_dim
        if said != own:
            raise ConfigInvalid(
                f"{where}: {CONFIG_FILE} gives d_inner, d_xb, ngroups, d_state as {said}; layer {index} needs {own}"
            )
