"""``Mamba2Mixer``: a Mamba-2 mixer that stands in for a decoder layer's ``self_attn``.

Parameter for parameter stock ``mamba_ssm.Mamba2`` with ``d_state = headdim = head_dim``, ``ngroups = nheads = heads``
and ``expand = heads · head_dim / hidden`` (multi-head attention); with grouped queries, x and B have
``kv_heads`` heads and are repeated after the convolution.

Shapes: B batch, L length, D hidden size, I inner size (heads · head_dim), X compact size (kv_heads · head_dim),
H heads, P head dimension, N state dimension (= P), C convolution channels (2X + I), K kernel width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from pipeline.ops import reference
from pipeline.ops.opset import TORCH, OpSet
from pipeline.states import MixerState, recurrent_layer
from schemas.hybrid import MixerDims

D_CONV = 4
# Kept in float32 whatever the model's type: decays near 1 do not survive eight bits of mantissa.
FLOAT32 = ("A_log", "D", "dt_bias")
# The kernels count elements in 32 bits; `in_proj`'s output is the largest tensor that they index.
MAX_ELEMENTS = 2**31 - 1
# Multiples at which the fused kernel reads rows and the parts of one.
FUSED_ALIGNMENT = 8


class _Norm(nn.Module):
    """Holds the gated norm's weight under stock Mamba-2's name."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class ScanInputs(NamedTuple):
    """What a scan takes: ``x``, ``b``, ``c`` [B, L, H, P], steps ``dt`` [B, L, H], decays ``a`` and skips ``d`` [H]."""

    x: Tensor
    dt: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor


class Mamba2Mixer(nn.Module):
    """The mixer; its forward has the call signature of every transformers 5 attention module."""

    def __init__(self, dims: MixerDims, layer_idx: int) -> None:
        super().__init__()
        self.dims, self.layer_idx, self.ops = dims, layer_idx, TORCH
        channels = 2 * dims.compact + dims.inner
        self.in_proj = nn.Linear(dims.hidden, dims.width, bias=dims.bias)
        self.conv1d = nn.Conv1d(channels, channels, D_CONV, groups=channels, padding=D_CONV - 1)
        self.dt_bias = nn.Parameter(torch.zeros(dims.heads, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.zeros(dims.heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.ones(dims.heads, dtype=torch.float32))
        self.norm = _Norm(dims.inner)
        self.b_norm, self.c_norm = (_Norm(dims.head_dim) if dims.qk_norm else None for _ in range(2))
        self.out_proj = nn.Linear(dims.inner, dims.hidden, bias=dims.bias)

    def use(self, ops: OpSet) -> None:
        """Sets the backend of the operations."""
        self.ops = ops

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,  # noqa: ARG002 - decoders pass it by name
        attention_mask: Any = None,  # noqa: ARG002 - decoders pass it by name
        past_key_values: Cache | None = None,
        padding_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """[B, L, D] to ([B, L, D], None).

        ``padding_mask`` is the 2-D mask [B, at least L] of real tokens; its last L columns count. ``seq_idx`` [B, L]
        numbers the sequences packed in a row, in ascending order. A transformers cache carries the states from call
        to call. Positions and the 4-D mask have no meaning for a recurrence and are ignored.
        """
        length = hidden_states.shape[1]
        keep = None if padding_mask is None else padding_mask[:, -length:, None].to(hidden_states.dtype)
        if past_key_values is None:
            return self._mix(hidden_states, keep, None, seq_idx)[0], None
        assert seq_idx is None, "packed rows do not go on from a cache"
        layer = recurrent_layer(past_key_values, self.layer_idx)
        out, state = self._mix(hidden_states, keep, layer.read(), None, carry=True)
        assert state is not None
        layer.write(state, length)
        return out, None

    def normed(self, u_BLD: Tensor) -> Tensor:
        """The gated, normed scan output [B, L, I] before ``out_proj``."""
        return self._scan(u_BLD, None, None, None)[0]

    def scan_inputs(self, u_BLD: Tensor) -> ScanInputs:
        """What the scan takes of whole rows [B, L, D]: after projection, convolution, activation and norms."""
        return self._before_scan(u_BLD, None, None, None)[0]

    def _mix(
        self,
        u_BLD: Tensor,
        keep: Tensor | None,
        state: MixerState | None,
        seq_idx: Tensor | None,
        carry: bool = False,
    ) -> tuple[Tensor, MixerState | None]:
        """Output and, if it is to be carried on, the state; in halves where one call would have too many elements."""
        batch, length, _ = u_BLD.shape
        if batch * length * self.dims.width <= MAX_ELEMENTS:
            if not carry and self._fuses(u_BLD, keep, state):
                assert self.ops.fused is not None
                return self.ops.fused(self.in_proj(u_BLD), self, seq_idx), None
            y, state = self._scan(u_BLD, keep, state, seq_idx)
            return self.out_proj(y), state
        along = 0 if batch > 1 else 1
        middle = u_BLD.shape[along] // 2
        (u0, u1), (keep0, keep1), (seq0, seq1) = (_halves(t, along, middle) for t in (u_BLD, keep, seq_idx))
        if along == 0:
            state0, state1 = (None, None) if state is None else state.split(middle)
            out0, after0 = self._mix(u0, keep0, state0, seq0, carry)
            out1, after = self._mix(u1, keep1, state1, seq1, carry)
            after = after0.join(after) if after0 and after else None
        else:
            out0, between = self._mix(u0, keep0, state, seq0, carry=True)
            if seq0 is not None and not torch.equal(seq0[:, -1], seq1[:, 0]):
                between = None  # the cut falls between two packed sequences
            out1, after = self._mix(u1, keep1, between, seq1, carry)
        return torch.cat([out0, out1], along), after

    def _fuses(self, u_BLD: Tensor, keep: Tensor | None, state: MixerState | None) -> bool:
        """Whether the backend's fused operation computes this call: whole unpadded rows, as many x as C heads."""
        dims = self.dims
        plain = keep is None and state is None and not dims.qk_norm and dims.heads == dims.kv_heads
        aligned = dims.width % FUSED_ALIGNMENT == 0 == dims.inner % FUSED_ALIGNMENT
        return self.ops.fused is not None and plain and aligned and u_BLD.is_cuda

    def _scan(
        self, u_BLD: Tensor, keep: Tensor | None, state: MixerState | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, MixerState]:
        """The gated, normed scan output [B, L, I], and the state after it."""
        (x, dt, a, b, c, d), z, window = self._before_scan(u_BLD, keep, state, seq_idx)
        if state is not None and u_BLD.shape[1] == 1:
            y, recurrent = self.ops.step(state.recurrent, x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], d)
            y = y[:, None]
        else:
            before = None if state is None else state.recurrent
            y, recurrent = self.ops.scan(x, dt, a, b, c, d, before, seq_idx)
        normed = self.ops.norm(y.flatten(-2), z, self.norm.weight, self.dims.heads, self.dims.eps)
        return normed, MixerState(window, recurrent)

    def _before_scan(
        self, u_BLD: Tensor, keep: Tensor | None, state: MixerState | None, seq_idx: Tensor | None
    ) -> tuple[ScanInputs, Tensor, Tensor]:
        """What the scan takes, the gate [B, L, I], and the convolution's window after the last token."""
        z, conv_in, dt = self._project(u_BLD)
        if keep is not None:  # nothing enters the window, and a step of 0 neither feeds nor decays the state
            conv_in, dt = conv_in * keep, dt * keep
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        mixed, window = self.ops.conv(conv_in, weight, bias, None if state is None else state.conv, seq_idx)
        x, b, c = self._heads(mixed)
        return ScanInputs(x, dt, -self.A_log.exp(), b, c, self.D), z, window

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gate [..., I], convolution input [..., C] and positive step size [..., H] of inputs [..., D]."""
        dims = self.dims
        # split as one, whose gradient is one tensor; each slice's own would be as wide as all of them
        z, conv_in, dt = self.in_proj(u).split([dims.inner, dims.inner + 2 * dims.compact, dims.heads], -1)
        return z, conv_in, F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias)

    def _heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, B, C, each [..., H, P], of the convolution's output [..., C]."""
        dims = self.dims
        x, b, c = mixed.split([dims.compact, dims.compact, dims.inner], -1)
        x, b, c = (t.unflatten(-1, (-1, dims.head_dim)) for t in (x, b, c))
        if self.b_norm is not None and self.c_norm is not None:
            b = (reference.rms_norm(b, dims.eps) * self.b_norm.weight).to(mixed.dtype)
            c = (reference.rms_norm(c, dims.eps) * self.c_norm.weight).to(mixed.dtype)
        repeat = dims.heads // dims.kv_heads
        if repeat > 1:
            x, b = x.repeat_interleave(repeat, -2), b.repeat_interleave(repeat, -2)
        return x, b, c

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Mamba2Mixer":
        before = {name: getattr(self, name).detach() for name in FLOAT32}
        super()._apply(fn, recurse)
        for name, value in before.items():
            parameter = getattr(self, name)
            if parameter.dtype in (torch.bfloat16, torch.float16) and not value.is_meta:
                parameter.data = value.to(parameter.device)
        return self


def _halves(tensor: Tensor | None, dim: int, middle: int) -> tuple[Any, Any]:
    if tensor is None:
        return None, None
    return tensor.narrow(dim, 0, middle), tensor.narrow(dim, middle, tensor.shape[dim] - middle)
