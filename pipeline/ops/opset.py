"""The operations that a mixer needs over whole sequences, from one backend, handed in from outside.

One-token steps and the gated norm are plain torch in every backend.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pipeline.ops import reference


@dataclass(frozen=True)
class OpSet:
    """``scan`` and ``conv`` have the signatures of ``reference.ssd_scan`` and ``reference.causal_conv``."""

    backend: str
    scan: Callable[..., tuple[Tensor, Tensor]]
    conv: Callable[[Tensor, Tensor, Tensor], Tensor]


TORCH = OpSet("torch", reference.ssd_scan, reference.causal_conv)
