"""The hybrid student: built from a teacher, written as a folder or as its trained tensors alone, and loaded again."""

import json
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from pydantic import ValidationError
from safetensors.torch import load, load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.folders import folder_config, folder_digests
from pipeline.headers import metadata_of
from pipeline.hub import folder_of
from pipeline.initialise import initialise
from pipeline.models import BiasedHead, add_head_bias, base_config, build_model, decoder, head, load_config, load_model
from pipeline.ops.backends import resolve
from pipeline.ops.opset import OpSet
from pipeline.surgery import mixers, refuse_unfit, replace_layers, trainable_names
from schemas.config import TeacherConfig
from schemas.errors import ConfigInvalid
from schemas.hybrid import MODEL_TYPE, RECORD, HybridRecord
from schemas.layers import LayerPlan
from schemas.sections import Backend, Init, Part


def has_bias(init: Init) -> bool:
    """Whether the mixers' projections carry biases: ``mimic`` needs them, the reference has none."""
    return init == "mimic"


def build_student(
    teacher: str | TeacherConfig,
    plan: LayerPlan,
    init: Init,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    ops: OpSet,
    digests: Mapping[str, str] | None = None,
    replaced: dict[int, nn.Module] | None = None,
) -> PreTrainedModel:
    """The teacher's model with initialised mixers in the planned layers; nothing requires a gradient yet.

    ``digests`` are the teacher folder's, where the caller has them already; ``replaced`` gets the attention modules.
    """
    model = load_model(teacher, dtype, device)
    generator = torch.Generator().manual_seed(seed)
    for index, attention in replace_layers(model, plan, bias=has_bias(init), ops=ops).items():
        if replaced is not None:
            replaced[index] = attention
        initialise(mixers(model)[index], attention, init, generator)
    mark(model, ops.backend, dict(digests or folder_digests(folder_of(teacher))))
    return model.requires_grad_(False)


@lru_cache(maxsize=8)
def check_plan(teacher: str | TeacherConfig, plan: LayerPlan) -> None:
    """Checks from the teacher's configuration alone that every planned layer can be replaced.

    Raises:
        ConfigInvalid: one cannot; names it, the reason, and the layers that can.
    """
    with torch.device("meta"):
        model = build_model(load_config(teacher), torch.float32)
    refuse_unfit(model, plan)


def mark(model: PreTrainedModel, backend: Backend, teacher: dict[str, str]) -> None:
    """Writes the hybrid's record into its configuration; ``backend`` is what its mixers were trained with."""
    found = {i: m.dims for i, m in mixers(model).items()}
    total = len(decoder(model).layers)  # type: ignore[arg-type]
    base, biased = model.config.model_type, isinstance(head(model), BiasedHead)
    record = HybridRecord(base=base, layers=total, mixers=found, backend=backend, teacher=teacher, head_bias=biased)
    setattr(model.config, RECORD, record.model_dump(mode="json"))
    # stock's own would write a folder that loads again without the mixers
    model.save_pretrained = partial(save_hybrid, model)


def record_of(model: PreTrainedModel) -> HybridRecord:
    """The record of a hybrid that was built or loaded here."""
    return HybridRecord.model_validate(getattr(model.config, RECORD))


def save_hybrid(model: PreTrainedModel, folder: str | Path) -> None:
    """Writes weights (safetensors, sharded above 5 GB, each in its own type) and configuration.

    ``config.json`` is the base model's, under a model type that stock transformers does not know, with the record.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(_owned(model), folder, max_shard_size="5GB")
    config = {**model.config.to_dict(), "model_type": MODEL_TYPE, "architectures": None}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def is_exported(folder: str) -> bool:
    """Whether the folder holds an exported student, and not a teacher."""
    return bool(folder_config(folder).get("model_type") == MODEL_TYPE)


def load_hybrid(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    backend: Backend = "auto",
) -> PreTrainedModel:
    """A hybrid from the folder that ``save_hybrid`` wrote, in eval mode without gradients. Needs no network.

    Raises:
        ConfigInvalid: the folder is not a hybrid's, or its tensors are not exactly the model's.
        BackendUnavailable: the named backend cannot be used here.
    """
    folder, device = Path(path), device or torch.device("cpu")
    settings = _hybrid_config(folder)
    record = _parse(settings.pop(RECORD, None), f"{path}: config.json")
    ops = resolve(backend, device)
    model = build_model(base_config(settings, record.base), dtype)
    replace_layers(model, LayerPlan(record.layers, record.replaced), bias=record.bias, ops=ops)
    if record.head_bias:
        add_head_bias(model)
    _same_mixers(model, record, str(path))
    mark(model, record.backend, record.teacher)
    weights = {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
    load_exactly(model, weights, str(path))
    return model.to(device).requires_grad_(False)


def _hybrid_config(folder: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise ConfigInvalid(f"{folder}: is not an exported student (no config.json)") from None
    if settings.get("model_type") != MODEL_TYPE:
        raise ConfigInvalid(f"{folder}: is not an exported student (config.json: model_type is not {MODEL_TYPE})")
    return settings


def _parse(value: Any, where: str) -> HybridRecord:
    try:
        return HybridRecord.model_validate(value)
    except ValidationError as error:
        raise ConfigInvalid(f"{where}: does not say what the hybrid is: {error}") from None


def _same_mixers(model: PreTrainedModel, record: HybridRecord, where: str) -> None:
    """The model's own layers give the mixers' sizes; they must be those of the record."""
    found = mixers(model)
    for index, dims in record.mixers.items():
        if found[index].dims != dims:
            raise ConfigInvalid(
                f"{where}: the mixer of layer {index} is recorded as {dims}; "
                f"the model's layer makes it {found[index].dims}"
            )


def _owned(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict with each tensor once, under its first name: tied weights share memory."""
    seen: set[tuple[int, torch.Size]] = set()
    found = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in seen or tensor.numel() == 0:
            found[name] = tensor
        seen.add(key)
    return found


@torch.no_grad()
def load_exactly(model: PreTrainedModel, weights: Mapping[str, Tensor], where: str) -> None:
    """Copies a full set of tensors into the model; every name and shape must agree.

    Raises:
        ConfigInvalid: a tensor is missing, has no place, or has another shape. The model is as it was.
    """
    _fill(_owned(model), weights, where, "the weights do not fit the model")


def _fill(places: Mapping[str, Tensor], weights: Mapping[str, Tensor], where: str, what: str) -> None:
    missing, unexpected = sorted(places.keys() - weights.keys()), sorted(weights.keys() - places.keys())
    shapes = [n for n in places.keys() & weights.keys() if places[n].shape != weights[n].shape]
    wrong = [
        f"{kind}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", sorted(shapes)))
        if names
    ]
    if wrong:
        raise ConfigInvalid(f"{where}: {what}; {'; '.join(wrong)}")
    for name, place in places.items():
        place.copy_(weights[name])


def trained_bytes(tensors: Mapping[str, Tensor], record: HybridRecord, parts: tuple[Part, ...]) -> bytes:
    """Trained tensors alone, as safetensors with the record of the hybrid that they belong to in the header."""
    header = {RECORD: record.model_copy(update={"trained": parts}).model_dump_json()}
    return save({k: v.detach().contiguous() for k, v in tensors.items()}, header)


def load_trained(
    path: str | Path,
    teacher: str | TeacherConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    backend: Backend = "auto",
) -> PreTrainedModel:
    """The hybrid of a trained checkpoint and the teacher that it was trained from.

    Raises:
        ConfigInvalid: the file is no such checkpoint, or of another teacher.
        BackendUnavailable: the named backend cannot be used here.
    """
    device = device or torch.device("cpu")
    data = Path(path).read_bytes()
    record, digests = _trained_record(data, str(path)), folder_digests(folder_of(teacher))
    _same_teacher(record, digests, str(path))
    model = load_model(teacher, dtype, device)
    ops = resolve(backend, device)
    replace_layers(model, LayerPlan(record.layers, record.replaced), bias=record.bias, ops=ops)
    mark(model, record.backend, digests)
    apply_trained(model, data, str(path))
    return model.requires_grad_(False)


@torch.no_grad()
def apply_trained(model: PreTrainedModel, data: bytes, where: str) -> None:
    """Puts a checkpoint's trained tensors over those of a student of the same teacher and plan.

    Raises:
        ConfigInvalid: it is of another teacher or plan, or its tensors are not exactly the student's trained ones.
    """
    record, own = _trained_record(data, where), record_of(model)
    _same_teacher(record, own.teacher, where)
    if own.replaced != record.replaced:
        raise ConfigInvalid(f"{where}: replaces layers {list(record.replaced)}; this student {list(own.replaced)}")
    _same_mixers(model, record, where)
    places = {n: model.get_parameter(n) for n in trainable_names(model, record.trained)}
    _fill(places, load(data), where, "the trained tensors are not this student's")
    mark(model, record.backend, own.teacher)


@torch.no_grad()
def apply_start(model: PreTrainedModel, data: bytes, where: str) -> frozenset[int]:
    """Puts an earlier student's trained tensors over those of a new one, which may replace further layers.

    Returns the layers whose mixers come from it.

    Raises:
        ConfigInvalid: it is of another teacher, or replaces layers or trains parts that this student does not.
    """
    record, own = _trained_record(data, where), record_of(model)
    _same_teacher(record, own.teacher, where)
    lacking = sorted(set(record.replaced) - set(own.replaced))
    if lacking:
        raise ConfigInvalid(f"{where}: replaces layers {lacking}, which this student keeps (student.layers)")
    _same_mixers(model, record, where)
    tensors = load(data)
    places = {n: p for n, p in model.named_parameters() if n in tensors}
    _fill(places, tensors, where, "the trained tensors are not this student's")
    return frozenset(record.replaced)


def _trained_record(data: bytes, where: str) -> HybridRecord:
    try:
        header = metadata_of(data)
    except ValueError:
        raise ConfigInvalid(f"{where}: is no safetensors file") from None
    return _parse(json.loads(header.get(RECORD, "null")), where)


def _same_teacher(record: HybridRecord, digests: Mapping[str, str], where: str) -> None:
    for part in ("weights", "config.json"):
        if record.teacher.get(part) != digests[part]:
            raise ConfigInvalid(
                f"{where}: was trained from another teacher: {part} {record.teacher.get(part)}, "
                f"this teacher's are {digests[part]}"
            )
