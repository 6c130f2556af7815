"""The weights of a TinyLLaVA checkpoint as transformers' Llava has them, copied tensor by tensor.

Owns the account of every tensor (none is missing, none is left over, none has another shape) and the row that a full
vocabulary gains for the image token.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlavaConfig

from pipeline.models import HEAD_BIAS, build_model
from pipeline.tinyllava.layout import Checkpoint, Stored, file_name, original_name
from schemas.errors import ConfigInvalid

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
# A shard is what is held in memory at once.
SHARD = "2GB"
# The logit of a token that is never predicted: float16 holds it, and its probability is 0 in every type.
NEVER = -1e4
# Names in an error.
SHOWN = 5


def account(checkpoint: Checkpoint, config: LlavaConfig) -> dict[str, Stored]:
    """Where each tensor of the model lies, by transformers' names, in the order of the checkpoint's files.

    Phi's language head has a bias; where a head is tied to the embedding, its weight is in the checkpoint or not.

    Raises:
        ConfigInvalid: the checkpoint's tensors are not exactly the model's.
    """
    with torch.device("meta"):
        places = {n: tuple(t.shape) for n, t in build_model(config, torch.float32).state_dict().items()}
    if config.text_config.model_type == "phi":
        places[HEAD_BIAS] = places[HEAD][:1]
    optional = {HEAD: places.pop(HEAD)} if config.tie_word_embeddings else {}
    names = {original_name(place): place for place in (*places, *optional)}
    found = {names[n]: stored for n, stored in checkpoint.tensors.items() if n in names}
    shapes = places | optional
    other = [original_name(p) for p, s in found.items() if s.shape != shapes[p] or s.dtype not in DTYPES]
    missing = [original_name(place) for place in places.keys() - found.keys()]
    _refuse(checkpoint, missing, list(checkpoint.tensors.keys() - names.keys()), other)
    if config.tie_word_embeddings and (head := found.pop(HEAD, None)):
        _same(_read(head), _read(found[EMBEDDING]), checkpoint)
    return found


def write_weights(found: Mapping[str, Stored], rows: int, folder: Path) -> None:
    """Writes the tensors, each in the type that it has; with ``rows``, the vocabulary is longer by as many.

    A row that is added is zero in embedding and head, and a bias keeps it from ever being predicted.
    """
    empty = {file_name(n): _empty(n, stored, rows) for n, stored in found.items()}
    added = _new_bias(found, rows)
    split = split_torch_state_dict_into_shards(empty | added, max_shard_size=SHARD)
    places = {file_name(n): n for n in found}
    for shard, names in split.filename_to_tensors.items():
        copied = {n: found[places[n]] for n in names if n in places}
        # open no longer than for a shard: what was read of a file stays in memory while it is open
        with ExitStack() as stack:
            files = {f: stack.enter_context(safe_open(f, "pt")) for f in {s.file for s in copied.values()}}
            tensors = {n: _longer(places[n], files[s.file].get_tensor(s.name), rows) for n, s in copied.items()}
            save_file(tensors | {n: t for n, t in added.items() if n in names}, folder / shard, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def stored_type(found: Mapping[str, Stored]) -> torch.dtype:
    """The type of the model, which is its embedding's."""
    return DTYPES[found[EMBEDDING].dtype]


def _refuse(checkpoint: Checkpoint, missing: list[str], unknown: list[str], other: list[str]) -> None:
    kinds = (("missing", missing), ("unknown", unknown), ("of another shape or type than configured", other))
    wrong = [f"{kind}: {_some(names)}" for kind, names in kinds if names]
    hint = "; MaTVLM's own are for `decant import-matvlm`" if any(".mamba." in name for name in unknown) else ""
    if wrong:
        raise ConfigInvalid(
            f"{checkpoint.folder}: the tensors are not those of the model in config.json; {'; '.join(wrong)}{hint}"
        )


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(sorted(names)[:SHOWN]) + rest


def _same(head: Tensor, embedding: Tensor, checkpoint: Checkpoint) -> None:
    if not torch.equal(head, embedding):
        raise ConfigInvalid(
            f"{checkpoint.folder}: language_model.lm_head.weight is not the embedding's, to which config.json ties it; "
            "set text_config.tie_word_embeddings to what is right"
        )


def _read(stored: Stored) -> Tensor:
    with safe_open(stored.file, "pt") as file:
        tensor: Tensor = file.get_tensor(stored.name)
    return tensor


def _empty(name: str, stored: Stored, rows: int) -> Tensor:
    shape = (stored.shape[0] + _grows(name, rows), *stored.shape[1:]) if stored.shape else ()
    return torch.empty(shape, dtype=DTYPES[stored.dtype], device="meta")


def _grows(name: str, rows: int) -> int:
    return rows if name in (EMBEDDING, HEAD, HEAD_BIAS) else 0


def _longer(name: str, tensor: Tensor, rows: int) -> Tensor:
    if not _grows(name, rows):
        return tensor
    return torch.cat([tensor, tensor.new_full((rows, *tensor.shape[1:]), NEVER if name == HEAD_BIAS else 0.0)])


def _new_bias(found: Mapping[str, Stored], rows: int) -> dict[str, Tensor]:
    """The bias of a head that has none and whose vocabulary grows."""
    if not rows or HEAD_BIAS in found:
        return {}
    bias = torch.zeros(found[EMBEDDING].shape[0], dtype=stored_type(found))
    return {file_name(HEAD_BIAS): _longer(HEAD_BIAS, bias, rows)}
