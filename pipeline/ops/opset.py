"""The operations that a mixer needs, from one backend, handed in from outside."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pipeline.ops import reference
from schemas.sections import Backend


@dataclass(frozen=True)
class OpSet:
    """``scan``, ``conv`` and ``step`` mean what ``reference.ssd_scan``, ``causal_conv`` and ``ssd_step`` do.

    ``fused`` is everything between ``in_proj`` and the mixer's output in one operation, where a backend has it; ``why``
    says how the backend was chosen.
    """

    backend: Backend
    scan: Callable[..., tuple[Tensor, Tensor]]
    conv: Callable[..., tuple[Tensor, Tensor]]
    step: Callable[..., tuple[Tensor, Tensor]]
    fused: Callable[..., Tensor] | None = None
    why: str = "named"


TORCH = OpSet("torch", reference.ssd_scan, reference.causal_conv, reference.ssd_step)
