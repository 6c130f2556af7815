"""``Mamba2Mixer``: a Mamba-2 mixer that stands in for a decoder layer's ``self_attn``.

Parameter for parameter stock ``mamba_ssm.Mamba2`` with ``d_state = headdim = head_dim``, ``ngroups = nheads = heads``
and ``expand = heads · head_dim / hidden`` (multi-head attention); with grouped queries, x and B have
``kv_heads`` heads and are repeated after the convolution.

Shapes: B batch, L length, D hidden size, I inner size (heads · head_dim), X compact size (kv_heads · head_dim),
H heads, P head dimension, N state dimension (= P), C convolution channels (2X + I), K kernel width.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.ops import reference
from pipeline.ops.opset import TORCH, OpSet

D_CONV = 4
# Kept in float32 whatever the model's type: decays near 1 do not survive eight bits of mantissa.
FLOAT32 = ("A_log", "D", "dt_bias")


@dataclass(frozen=True)
class MixerDims:
    """Sizes of one mixer. ``bias`` adds biases to the input and output projections."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    bias: bool
    eps: float = 1e-5

    @property
    def inner(self) -> int:
        """Width of z, C and the output of the scan."""
        return self.heads * self.head_dim

    @property
    def compact(self) -> int:
        """Width of x and of B before they are repeated."""
        return self.kv_heads * self.head_dim

    @property
    def rows(self) -> dict[str, slice]:
        """The row blocks of ``in_proj``: z, x, B, C, dt."""
        sizes = {"z": self.inner, "x": self.compact, "B": self.compact, "C": self.inner, "dt": self.heads}
        blocks, at = {}, 0
        for name, size in sizes.items():
            blocks[name] = slice(at, at + size)
            at += size
        return blocks

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


class _Norm(nn.Module):
    """Holds the gated norm's weight under stock Mamba-2's name."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class Mamba2Mixer(nn.Module):
    """The mixer; its forward has the call signature of every transformers 5 attention module."""

    def __init__(self, dims: MixerDims, layer_idx: int) -> None:
        super().__init__()
        self.dims, self.layer_idx, self.ops = dims, layer_idx, TORCH
        channels = 2 * dims.compact + dims.inner
        self.in_proj = nn.Linear(dims.hidden, dims.rows["dt"].stop, bias=dims.bias)
        self.conv1d = nn.Conv1d(channels, channels, D_CONV, groups=channels, padding=D_CONV - 1)
        self.dt_bias = nn.Parameter(torch.zeros(dims.heads, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.zeros(dims.heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.ones(dims.heads, dtype=torch.float32))
        self.norm = _Norm(dims.inner)
        self.out_proj = nn.Linear(dims.inner, dims.hidden, bias=dims.bias)

    def use(self, ops: OpSet) -> None:
        """Sets the backend of the operations."""
        self.ops = ops

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,  # noqa: ARG002 - decoders pass it by name
        attention_mask: Any = None,  # noqa: ARG002 - decoders pass it by name
        past_key_values: Any = None,
        padding_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """[B, L, D] to ([B, L, D], None).

        ``padding_mask`` is the 2-D mask [B, at least L] of real tokens; its last L columns count. A transformers cache
        with a linear-attention layer at ``layer_idx`` carries the states from call to call. Positions and the 4-D mask
        have no meaning for a recurrence and are ignored.
        """
        length = hidden_states.shape[1]
        keep = None if padding_mask is None else padding_mask[:, -length:, None].to(hidden_states.dtype)
        if past_key_values is not None and past_key_values.has_previous_state(self.layer_idx):
            steps = [
                self._step(hidden_states[:, t], None if keep is None else keep[:, t], past_key_values)
                for t in range(length)
            ]
            return torch.stack(steps, 1), None
        return self._sequence(hidden_states, keep, past_key_values), None

    def normed(self, u_BLD: Tensor) -> Tensor:
        """The gated, normed scan output [B, L, I] before ``out_proj``."""
        return self._scan(u_BLD, None, None)

    def _sequence(self, u_BLD: Tensor, keep: Tensor | None, cache: Any) -> Tensor:
        out: Tensor = self.out_proj(self._scan(u_BLD, keep, cache))
        return out

    def _scan(self, u_BLD: Tensor, keep: Tensor | None, cache: Any) -> Tensor:
        z, conv_in, dt = self._project(u_BLD)
        if keep is not None:
            conv_in = conv_in * keep
        mixed = self.ops.conv(conv_in, *self._filter())
        if keep is not None:  # the convolution's bias and SiLU make something of nothing
            mixed = mixed * keep
        x, b, c = self._heads(mixed)
        y, state = self.ops.scan(x, dt, -self.A_log.float().exp(), b, c, self.D)
        if cache is not None:
            window = F.pad(conv_in, (0, 0, max(0, D_CONV - conv_in.shape[1]), 0))[:, -D_CONV:]
            cache.update_conv_state(window.transpose(1, 2), self.layer_idx)
            cache.update_recurrent_state(state, self.layer_idx)
        return reference.gated_rms_norm(y.flatten(-2), z, self.norm.weight, self.dims.heads, self.dims.eps)

    def _step(self, u_BD: Tensor, keep: Tensor | None, cache: Any) -> Tensor:
        z, conv_in, dt = self._project(u_BD)
        if keep is not None:
            conv_in = conv_in * keep
        window = cache.update_conv_state(conv_in[..., None], self.layer_idx)[..., -D_CONV:]
        mixed = reference.conv_step(window, *self._filter())
        if keep is not None:
            mixed = mixed * keep
        x, b, c = self._heads(mixed)
        state = cache.layers[self.layer_idx].recurrent_states[0]
        y, state = reference.ssd_step(state, x, dt, -self.A_log.float().exp(), b, c, self.D)
        cache.update_recurrent_state(state, self.layer_idx)
        y = reference.gated_rms_norm(y.flatten(-2), z, self.norm.weight, self.dims.heads, self.dims.eps)
        out: Tensor = self.out_proj(y)
        return out

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Z [..., I], convolution input [..., C] and positive step size [..., H] of inputs [..., D]."""
        rows = self.dims.rows
        projected = self.in_proj(u)
        dt = F.softplus(projected[..., rows["dt"]].float() + self.dt_bias)
        return projected[..., rows["z"]], projected[..., rows["x"].start : rows["C"].stop], dt

    def _filter(self) -> tuple[Tensor, Tensor]:
        """The convolution's weight [C, K] and bias [C]."""
        assert self.conv1d.bias is not None
        return self.conv1d.weight.squeeze(1), self.conv1d.bias

    def _heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, B, C, each [..., H, P], of the convolution's output [..., C]."""
        dims = self.dims
        x, b, c = mixed.split([dims.compact, dims.compact, dims.inner], -1)
        x, b, c = (t.unflatten(-1, (-1, dims.head_dim)) for t in (x, b, c))
        repeat = dims.heads // dims.kv_heads
        if repeat > 1:
            x, b = x.repeat_interleave(repeat, -2), b.repeat_interleave(repeat, -2)
        return x, b, c

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Mamba2Mixer":
        before = {name: getattr(self, name).detach() for name in FLOAT32}
        super()._apply(fn, recurse)
        for name, value in before.items():
            parameter = getattr(self, name)
            if parameter.dtype != torch.float32 and not value.is_meta:
                parameter.data = value.to(parameter.device, torch.float32)
        return self
