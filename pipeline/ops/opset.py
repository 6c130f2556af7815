"""The operations that a mixer needs, from one backend, handed in from outside."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pipeline.ops import reference
from schemas.sections import Backend


@dataclass(frozen=True)
class OpSet:
    """A backend's operations, of which each means one of ``reference``'s.

    ``scan`` means ``ssd_scan``, ``conv`` ``causal_conv``, ``step`` ``ssd_step`` and ``norm`` ``gated_rms_norm``;
    ``fused`` is everything between ``in_proj`` and the mixer's output in one operation, where a backend has it; ``why``
    says how the backend was chosen.
    """

    backend: Backend
    scan: Callable[..., tuple[Tensor, Tensor]]
    conv: Callable[..., tuple[Tensor, Tensor]]
    step: Callable[..., tuple[Tensor, Tensor]]
    norm: Callable[..., Tensor] = reference.gated_rms_norm
    fused: Callable[..., Tensor] | None = None
    why: str = "named"


TORCH = OpSet("torch", reference.ssd_scan, reference.causal_conv, reference.ssd_step)
