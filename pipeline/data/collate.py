"""Samples to model inputs: padded token ids, padding mask and what the model takes of images."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.data.images import decode_image
from pipeline.data.processors import Processor
from schemas.sections import Positions

# Arrays by the name of the model's keyword.
Features = dict[str, np.ndarray]


def pad_tokens(rows: Sequence[np.ndarray], pad_id: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids [B, L] and mask [B, L] (1 for real tokens) of ragged rows."""
    length = max(len(r) for r in rows)
    ids = np.full((len(rows), length), pad_id, np.int64)
    mask = np.zeros((len(rows), length), np.int64)
    for i, row in enumerate(rows):
        at = slice(length - len(row), length) if left else slice(0, len(row))
        ids[i, at], mask[i, at] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def image_features(processor: Processor, images: Sequence[bytes]) -> Features:
    """What the model takes of one sample's images, nothing where it has none."""
    return processor.features([decode_image(data) for data in images]) if images else {}


def model_inputs(ids_BL: Tensor, features: Sequence[Features], image_token_id: int | None) -> dict[str, Tensor]:
    """``input_ids`` and what the model takes of all the samples' images.

    Arrays are joined along their first axis. Where samples differ in others, as the numbers of tiles of LlavaNext do,
    zeros fill up; the model knows from the images' sizes what they are. Families with 3-D rotary positions
    (Qwen2-VL, 2.5-VL) are told which tokens are an image's.
    """
    found = [f for f in features if f]
    inputs = {"input_ids": ids_BL}
    for name in found[0] if found else ():
        inputs[name] = torch.from_numpy(_joined([f[name] for f in found]))
    if "image_grid_thw" in inputs:
        assert image_token_id is not None
        inputs["mm_token_type_ids"] = ids_BL.eq(image_token_id).int()
    return inputs


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    widest = np.max([a.shape[1:] for a in arrays], axis=0)
    if all(a.shape[1:] == tuple(widest) for a in arrays):
        return np.concatenate(arrays)
    return np.concatenate([np.pad(a, [(0, 0), *((0, int(n)) for n in widest - a.shape[1:])]) for a in arrays])


def predicting_positions(spans: np.ndarray) -> np.ndarray:
    """int64[P]: positions whose next token is supervised. The first token of a sequence is predicted by none."""
    ranges = [np.arange(max(start, 1) - 1, stop - 1) for start, stop in spans]
    return np.concatenate(ranges).astype(np.int64)


def target_positions(kind: Positions, spans: np.ndarray, ids: np.ndarray, image_token_id: int | None) -> np.ndarray:
    """int64[P]: the positions of a sample that have a target."""
    if kind == "response":
        return predicting_positions(spans)
    positions = np.arange(len(ids), dtype=np.int64)
    return positions if kind == "all" else positions[:-1][ids[1:] != image_token_id]


def next_tokens(ids: np.ndarray) -> np.ndarray:
    """int64[L]: the token that follows each position; the last one, which none follows, has its own."""
    return np.append(ids[1:], ids[-1:]).astype(np.int64)
