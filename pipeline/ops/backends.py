"""Chooses a backend once and out loud: ``torch`` is the meaning, ``mamba-ssm`` (CUDA only) the speed.

The kernels come from mamba-ssm and causal-conv1d, which are imported only when they are chosen.
"""

import importlib
import logging
import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.ops import reference
from pipeline.ops.opset import TORCH, OpSet
from pipeline.ops.stepping import PLAIN, StepOps
from schemas.errors import BackendUnavailable
from schemas.sections import Backend

log = logging.getLogger("decant")
# The kernels want a power of two, and rows of any length. Stock Mamba-2 has 256; but a chunk's scores, which here every
# head has of its own and the backward pass copies once more, are tokens × heads × chunk values: 128 is a sixth faster.
CHUNK = 128
# The convolution's channel-last kernel reads eight channels at a time, from rows that begin at multiples of that.
CONV_ALIGNMENT = 8
INSTALL = "install the kernels with: pip install --no-build-isolation mamba-ssm causal-conv1d"
CURE = "; or name `torch` or `auto`"


def resolve(backend: Backend, device: torch.device) -> OpSet:
    """The backend's operations; only ``auto`` chooses, and logs why.

    Raises:
        BackendUnavailable: ``mamba-ssm`` was named, and it is not installed or the device is no CUDA device.
    """
    if backend == "torch":
        return TORCH
    if backend == "mamba-ssm":
        return mamba_ssm(device)
    if device.type != "cuda":
        ops = replace(TORCH, why=f"auto: the kernels need a CUDA device, this is {device.type}")
    else:
        try:
            ops = replace(mamba_ssm(device), why="auto: its kernels are installed and the device is CUDA")
        except BackendUnavailable as error:
            ops = replace(TORCH, why=f"auto: {str(error).removesuffix(CURE)}")
    log.info("operations: %s (%s)", ops.backend, ops.why)
    return ops


def mamba_ssm(device: torch.device, chunk: int = CHUNK) -> OpSet:
    """The kernels of mamba-ssm and causal-conv1d; the scan goes by ``chunk`` tokens at once, a power of two.

    Raises:
        BackendUnavailable: they cannot be imported, or cannot run on the device.
    """
    # float32 shall mean float32, as in torch's own products; Triton would round the factors to ten bits
    if torch.get_float32_matmul_precision() == "highest":
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    try:
        kernels = _Kernels(chunk)
    except ImportError as error:
        raise BackendUnavailable(f"placement.backend: mamba-ssm cannot be imported: {error}; {INSTALL}{CURE}") from None
    if device.type != "cuda":
        raise BackendUnavailable(f"placement.backend: mamba-ssm needs a CUDA device, this is {device.type}{CURE}")
    return OpSet("mamba-ssm", kernels.scan, kernels.conv, kernels.step, kernels.norms.gated_rms_norm, kernels.fused)


def step_ops(device: torch.device) -> StepOps:
    """The operations of a decoding step: Triton's kernels on CUDA where it is installed, else plain torch."""
    if device.type != "cuda":
        return PLAIN
    try:
        made: StepOps = importlib.import_module("pipeline.ops.step_kernels").kernels()
    except ImportError as error:
        log.info("decoding: plain torch (%s)", error)
        return PLAIN
    return made


class _Kernels:
    """The imported packages, called as ``reference``'s functions are."""

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk
        self.combined: Any = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
        self.update: Any = importlib.import_module("mamba_ssm.ops.triton.selective_state_update")
        self.convolution: Any = importlib.import_module("causal_conv1d")
        self.norms: Any = importlib.import_module("pipeline.ops.norm_kernels")

    def scan(
        self,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        d: Tensor,
        state: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if seq_idx is not None:
            seq_idx = seq_idx - seq_idx[:, :1]  # the kernel takes an initial state for sequence 0's
        y, final = self.combined.mamba_chunk_scan_combined(
            x, dt, a, b, c, self.chunk, D=d, initial_states=state, seq_idx=_int32(seq_idx), return_final_states=True
        )
        return y, final

    def conv(
        self, x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        # the kernel has no packed rows that go on from a state, and no odd channel counts
        if x.shape[-1] % CONV_ALIGNMENT or (state is not None and seq_idx is not None):
            return reference.causal_conv(x, weight, bias, state, seq_idx)
        if x.stride(0) % CONV_ALIGNMENT or x.stride(1) % CONV_ALIGNMENT or x.storage_offset() % CONV_ALIGNMENT:
            x = x.contiguous()
        before = None if state is None else state.to(x.dtype).contiguous()
        out = self.convolution.causal_conv1d_fn(
            x.transpose(1, 2),
            weight,
            bias,
            seq_idx=_int32(seq_idx),
            initial_states=None if before is None else before.transpose(1, 2),
            activation="silu",
        )
        return out.transpose(1, 2), reference.conv_state(x, weight.shape[1] - 1, before, seq_idx)

    def step(
        self, state: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor
    ) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():  # the kernel has no backward
            return reference.ssd_step(state, x, dt, a, b, c, d)
        width, size = x.shape[-1], b.shape[-1]
        state = state.clone()  # the kernel writes into it
        y = self.update.selective_state_update(
            state,
            x,
            dt[..., None].expand(-1, -1, width),
            a[:, None, None].expand(-1, width, size),
            b,
            c,
            d[:, None].expand(-1, width),
            dt_bias=torch.zeros_like(a)[:, None].expand(-1, width),  # it fails without one
        )
        return y, state

    def fused(self, projected: Tensor, mixer: Any, seq_idx: Tensor | None) -> Tensor:
        out: Tensor = self.combined.mamba_split_conv1d_scan_combined(
            projected,
            mixer.conv1d.weight.squeeze(1),
            mixer.conv1d.bias,
            mixer.dt_bias,
            -mixer.A_log.exp(),
            mixer.D,
            self.chunk,
            seq_idx=_int32(seq_idx),
            rmsnorm_weight=mixer.norm.weight,
            rmsnorm_eps=mixer.dims.eps,
            outproj_weight=mixer.out_proj.weight,
            outproj_bias=mixer.out_proj.bias,
            headdim=mixer.dims.head_dim,
            ngroups=mixer.dims.heads,
            norm_before_gate=False,
        )
        return out


def _int32(seq_idx: Tensor | None) -> Tensor | None:
    return None if seq_idx is None else seq_idx.to(torch.int32).contiguous()
