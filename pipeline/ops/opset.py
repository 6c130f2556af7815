"""The operations that a mixer needs, from one backend, chosen once and out loud.

``torch`` is the meaning, ``mamba-ssm`` (with causal-conv1d, CUDA only) the speed of the two operations over whole
sequences; one-token steps and the norm run in torch in both.
"""

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.ops import reference
from schemas.errors import BackendUnavailable

log = logging.getLogger("decant")


@dataclass(frozen=True)
class OpSet:
    """``scan`` and ``conv`` have the signatures of ``reference.ssd_scan`` and ``reference.causal_conv``."""

    backend: Literal["torch", "mamba-ssm"]
    scan: Callable[..., tuple[Tensor, Tensor]]
    conv: Callable[[Tensor, Tensor, Tensor], Tensor]


TORCH = OpSet("torch", reference.ssd_scan, reference.causal_conv)


def resolve(backend: Literal["auto", "torch", "mamba-ssm"], device: torch.device) -> OpSet:
    """The backend's operations; only ``auto`` chooses, and logs why.

    Raises:
        BackendUnavailable: ``mamba-ssm`` was named, and it is not installed or the device is no CUDA device.
    """
    if backend == "torch":
        return TORCH
    reason = _obstacle(device)
    if backend == "mamba-ssm" and reason:
        raise BackendUnavailable(f"placement.backend: mamba-ssm: {reason}; use `torch` or `auto`")
    log.info("operations: %s", f"torch ({reason})" if reason else "mamba-ssm")
    return TORCH if reason else _mamba_ssm()


def _obstacle(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"its kernels need a CUDA device, this is {device.type}"
    for module in ("mamba_ssm.ops.triton.ssd_combined", "causal_conv1d"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            return f"{module} cannot be imported ({error})"
    return None


def _mamba_ssm() -> OpSet:
    combined: Any = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    causal_conv1d: Any = importlib.import_module("causal_conv1d")

    def scan(
        x_BLHP: Tensor, dt_BLH: Tensor, a_H: Tensor, b_BLHN: Tensor, c_BLHN: Tensor, d_H: Tensor, chunk: int = 128
    ) -> tuple[Tensor, Tensor]:
        y, state = combined.mamba_chunk_scan_combined(
            x_BLHP, dt_BLH, a_H, b_BLHN, c_BLHN, chunk, D=d_H, return_final_states=True
        )
        return y, state.float()

    def conv(x_BLC: Tensor, weight_CK: Tensor, bias_C: Tensor) -> Tensor:
        # [B, C, L] with channels contiguous, which the kernel takes without a copy
        out = causal_conv1d.causal_conv1d_fn(x_BLC.transpose(1, 2), weight_CK, bias_C, activation="silu")
        return out.transpose(1, 2)

    return OpSet("mamba-ssm", scan, conv)
