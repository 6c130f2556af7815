"""Samples to model inputs: right-padded token ids, padding mask and pixel values."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.encoding import decode_image
from schemas.sections import Positions


def pad_tokens(rows: Sequence[np.ndarray], pad_id: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids [B, L] and mask [B, L] (1 for real tokens) of ragged rows."""
    length = max(len(r) for r in rows)
    ids = np.full((len(rows), length), pad_id, np.int64)
    mask = np.zeros((len(rows), length), np.int64)
    for i, row in enumerate(rows):
        at = slice(length - len(row), length) if left else slice(0, len(row))
        ids[i, at], mask[i, at] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def pixel_values(processor: Any, images: Sequence[bytes | None]) -> Tensor | None:
    """The processor's pixel values of the images that there are, None where there are none."""
    found = [decode_image(data) for data in images if data is not None]
    if not found:
        return None
    pixels = processor.image_processor(found, return_tensors="pt")["pixel_values"]
    assert isinstance(pixels, Tensor)
    return pixels


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


def pad_id_of(tokenizer: Any) -> int:
    """A token id for padding; any will do, since padding is masked."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)
