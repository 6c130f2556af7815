"""Taps: the input (the normalised hidden state) and the output of attention layers, each [L, D], of some samples."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


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
