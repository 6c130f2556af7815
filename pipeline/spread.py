"""How a teacher that is too large for one device is spread over several.

``layers``: the first device holds what is not a layer, so that the model takes its inputs and leaves its last hidden
states and logits there, and each holds so many layers that all hold about as many bytes. ``tensor``: transformers'
plan for the model's class says how each matrix is cut; every rank has whole hidden states and logits.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.distributed import DistributedConfig

from pipeline.models import build_model, decoder, load_config
from schemas.config import TeacherConfig
from schemas.errors import ConfigInvalid
from schemas.placement import CachePlacement


def refuse_split(teacher: TeacherConfig, place: CachePlacement) -> None:
    """Checks from the teacher's configuration that the teacher can be split as the placement says.

    Raises:
        ConfigInvalid: it cannot; says why.
    """
    config = load_config(teacher).get_text_config()
    if place.split == "layers":
        if place.parts > config.num_hidden_layers:
            raise ConfigInvalid(
                f"placement.cache.gpus_per_worker: {teacher.path}: {config.num_hidden_layers} layers cannot be split "
                f"over {place.parts} devices; give a worker fewer"
            )
        return
    if not getattr(config, "base_model_tp_plan", None):
        raise ConfigInvalid(
            f"placement.cache.split: {teacher.path}: transformers has no tensor parallel plan for {config.model_type}; "
            "use `layers`"
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        count = getattr(config, name, None)
        if isinstance(count, int) and count % place.parts:
            raise ConfigInvalid(
                f"placement.cache.split: {teacher.path}: {name} ({count}) cannot be cut into {place.parts} equal "
                "parts; give a worker another number of devices, or use `layers`"
            )


def spread(
    teacher: TeacherConfig, dtype: torch.dtype, device: torch.device, place: CachePlacement
) -> dict[str, Any] | None:
    """What ``load_model`` needs to put the teacher on several devices; None where it is whole on one.

    Raises:
        ConfigInvalid: the teacher cannot be split so, or this process does not have so many devices.
    """
    refuse_split(teacher, place)
    found = torch.cuda.device_count()
    if device.type == "cuda" and found < place.parts:
        raise ConfigInvalid(f"placement.cache.gpus_per_worker: {place.parts} are asked for, this process sees {found}")
    if place.parts == 1 or (place.split == "layers" and device.type == "cpu"):
        return None
    if place.split == "layers":
        return {"device_map": layer_map(teacher, dtype, [torch.device(device.type, i) for i in range(place.parts)])}
    if device.type == "cpu" and found:
        raise ConfigInvalid("placement.device: `cpu` with split: `tensor` needs a worker that sees no GPU")
    return {"distributed_config": DistributedConfig(tp_size=place.parts, tp_plan="auto")}


def layer_map(teacher: TeacherConfig, dtype: torch.dtype, devices: list[torch.device]) -> dict[str, torch.device]:
    """The device of each part of the folder's model, by name; see the module's text."""
    with torch.device("meta"):
        model = build_model(load_config(teacher), dtype)
    layers: Any = decoder(model).layers
    inside = set(layers)
    names = {layer: name for name, layer in model.named_modules() if layer in inside}
    sizes = [_bytes(layer) for layer in layers]
    share, before = _bytes(model) / len(devices), _bytes(model) - sum(sizes)
    found = dict.fromkeys(_outside(model, layers), devices[0])
    for layer, size in zip(layers, sizes, strict=True):
        # where its middle falls when all is laid end to end
        found[names[layer]] = devices[min(int((before + size / 2) / share), len(devices) - 1)]
        before += size
    return found


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in module.parameters())


def _outside(module: nn.Module, layers: nn.Module, prefix: str = "") -> Iterator[str]:
    """The names of the largest parts without a layer in them."""
    for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        yield prefix + name
    for name, child in module.named_children():
        if layers not in set(child.modules()):
            yield prefix + name
        elif child is not layers:
            yield from _outside(child, layers, f"{prefix}{name}.")
