"""Taps: the input (the normalised hidden state) and the output of attention layers, each [L, D], of some samples."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from pipeline.activations import Activation, stored_parts


def is_tapped(sample_id: str, fraction: float, seed: int) -> bool:
    """Whether a sample belongs to the tapped fraction: depends on nothing but itself and the seed."""
    return place_of(f"tap:{seed}:{sample_id}") < fraction * 2**64


def place_of(text: str) -> int:
    """A number in [0, 2^64) that depends on nothing but the text, evenly spread over texts."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@contextmanager
def recorded(layers: Any, chosen: tuple[int, ...]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """While open, each forward leaves (input, attention output), both [B, L, D], of the chosen layers."""
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, Any]) -> None:
            found[index] = (args[0] if args else kwargs["hidden_states"], output[0])

        return hook

    handles = [layers[i].self_attn.register_forward_hook(keep(i), with_kwargs=True) for i in chosen]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class TapBuffers:
    """The taps of a shard's rows on the host: a column is one buffer, which becomes an Arrow array as it is.

    Taps are most of a cache's bytes: each further copy would cost as much time as writing them.
    """

    def __init__(self, tokens: Sequence[int], *, pinned: bool, room: int = 0) -> None:
        """``tokens`` of each row, 0 where it has no taps.

        Buffers have ``room`` for so many if that is more. Pinning memory takes as long as filling it, and what has
        been pinned is used again for as much: so there should be few sizes.
        """
        self.ends, self.pinned = np.cumsum(tokens, dtype=np.int64), pinned
        self.tokens, self.room = np.array(tokens, np.int64), max(room, sum(tokens))
        self.parts: dict[str, Tensor] = {}

    def keep(self, name: str, row: int, packed: Activation) -> None:
        """Queues the copy of one row's tap [L, D] behind what computes it."""
        for part, value in stored_parts(name, packed).items():
            if part not in self.parts:
                shape = (self.room, *value.shape[1:])
                self.parts[part] = torch.empty(shape, dtype=value.dtype, pin_memory=self.pinned)
            place = slice(self.ends[row] - self.tokens[row], self.ends[row])
            self.parts[part][place].copy_(value, non_blocking=True)

    def columns(self) -> dict[str, pa.Array]:
        """The columns that have values, rows without taps empty; once the copies are there."""
        validity = pa.array(self.tokens > 0).buffers()[1]
        found = {}
        for part, value in self.parts.items():
            width = value[0].numel() * value.element_size()
            offsets = pa.py_buffer(np.concatenate([[0], self.ends]) * width)
            buffers = [validity, offsets, pa.py_buffer(value[: self.ends[-1]].numpy())]
            found[part] = pa.Array.from_buffers(pa.large_binary(), len(self.tokens), buffers)
        return found
