"""The operations of one decoding step, in plain torch: what they mean, on any device and in any type.

A step takes one new token of each sequence through its layers: ``project`` (norm and every product of it), ``attend``
or ``mix``, ``advance`` (products added to the residual, and the next ``project`` of it); in the end ``argmax``.
``PLAIN`` is the truth that kernels are compared with. All arithmetic is float32 or wider and each result is rounded
once; a model's own layers round to its type in between. Nothing here asks the device for a value, so all of it can be
captured in a CUDA graph.

Shapes: B sequences, K and N inputs and outputs of a product, H heads, G key-value heads, D head dimension, S slots of
a cache, R rotated dimensions, I inner size (H · D), C channels of a mixer's convolution, T its width - 1, P and N the
sides of its state.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.mixer import Mamba2Mixer
from pipeline.ops import reference
from schemas.hybrid import MixerDims

Activation = Literal["gelu_tanh", "gelu", "silu", "relu"]

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
}


@dataclass(frozen=True)
class LayerNorm:
    """``(x - mean) / sqrt(variance + eps) · weight + bias``, weight and bias [K]."""

    weight: Tensor
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class RmsNorm:
    """``x / sqrt(mean(x²) + eps) · weight``, weight [K]; a family that multiplies by 1 + weight gives that."""

    weight: Tensor
    eps: float


Norm = LayerNorm | RmsNorm


@dataclass(frozen=True)
class Projection:
    """``act(x W^T + b)``; with a gate ``act(x Wg^T + bg) · (x W^T + b)``; weights [N, K], biases [N]."""

    weight: Tensor
    bias: Tensor | None = None
    activation: Activation | None = None
    gate: Tensor | None = None
    gate_bias: Tensor | None = None


@dataclass(frozen=True)
class Term:
    """``x W^T + b`` of ``advance``: x [B, K], weight [N, K], bias [N]."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class MixerWeights:
    """What a mixer holds between its projections.

    ``conv`` [C, T + 1], ``conv_bias`` [C], ``a`` (negative), ``d`` and ``dt_bias`` [H] in float32, ``norm`` [I],
    ``b_norm`` and ``c_norm`` [D] or None.
    """

    dims: MixerDims
    conv: Tensor
    conv_bias: Tensor
    a: Tensor
    d: Tensor
    dt_bias: Tensor
    norm: Tensor
    b_norm: Tensor | None
    c_norm: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, mixer: Mamba2Mixer) -> "MixerWeights":
        """The mixer's own tensors, and ``a = -exp(A_log)`` as it is now."""
        conv, bias = mixer.conv1d.weight.detach().squeeze(1), mixer.conv1d.bias
        assert bias is not None, "the mixer's convolution has a bias"
        b_norm, c_norm = (None if n is None else n.weight.detach() for n in (mixer.b_norm, mixer.c_norm))
        a, d, dt_bias = (t.detach() for t in (-mixer.A_log.exp(), mixer.D, mixer.dt_bias))
        return cls(mixer.dims, conv, bias.detach(), a, d, dt_bias, mixer.norm.weight.detach(), b_norm, c_norm)


@dataclass(frozen=True)
class StepOps:
    """A step's five operations; each means what the function of that name in this module does."""

    attend: Callable[..., Tensor]
    mix: Callable[[Tensor, MixerWeights, Tensor, Tensor], Tensor]
    project: Callable[[Tensor, Norm | None, Sequence[Projection]], list[Tensor]]
    advance: Callable[[Tensor, Sequence[Term], Norm | None, Sequence[Projection]], tuple[Tensor, list[Tensor]]]
    argmax: Callable[[Tensor, Tensor], None]


def project(x_BK: Tensor, norm: Norm | None, parts: Sequence[Projection]) -> list[Tensor]:
    """Each part [B, N_i] of the normed input, in x's type."""
    normed = normalise(x_BK, norm)
    return [_projected(normed, part).to(x_BK.dtype) for part in parts]


def normalise(x_BK: Tensor, norm: Norm | None) -> Tensor:
    """The normed input, at least float32."""
    wide = _wide(x_BK)
    if norm is None:
        return wide
    if isinstance(norm, RmsNorm):
        return reference.rms_norm(wide, norm.eps) * _wide(norm.weight)
    bias = None if norm.bias is None else norm.bias.to(wide.dtype)
    return F.layer_norm(wide, wide.shape[-1:], norm.weight.to(wide.dtype), bias, norm.eps)


def activated(value: Tensor, activation: Activation | None) -> Tensor:
    """The activation of a value, by its name."""
    return value if activation is None else _ACTIVATIONS[activation](value)


def advance(
    residual_BN: Tensor, terms: Sequence[Term], norm: Norm | None, parts: Sequence[Projection]
) -> tuple[Tensor, list[Tensor]]:
    """``residual + Σ_j (x_j W_j^T + b_j)`` [B, N] in the residual's type, and what ``project`` makes of it."""
    total = _wide(residual_BN)
    for term in terms:
        total = total + _linear(_wide(term.x), term.weight, term.bias)
    added = total.to(residual_BN.dtype)
    return added, project(added, norm, parts)


def attend(
    q_BHD: Tensor,
    k_BGD: Tensor | None,
    v_BGD: Tensor | None,
    rotary: tuple[Tensor, Tensor] | None,
    keys_BGSD: Tensor,
    values_BGSD: Tensor,
    position: Tensor,
    first_B: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of one query a head over the slots ``max(first, position - window + 1) .. position``: [B, H · D].

    ``position`` [1] is the new token's slot, the same in all rows, ``first`` [B] each row's first real one; both int64
    and on the device. The new key (rotated) and value are written there in place; without them the caches hold both.
    ``rotary`` are cosine and sine [B, R] of the first R dimensions, whose halves turn against each other (transformers'
    ``rotate_half``). ``softcap``: scores become ``cap · tanh(score / cap)``.
    """
    q = q_BHD if rotary is None else rotate(q_BHD, *rotary)
    if k_BGD is not None and v_BGD is not None:
        new = k_BGD if rotary is None else rotate(k_BGD, *rotary)
        keys_BGSD.index_copy_(2, position, new[:, :, None].to(keys_BGSD.dtype))
        values_BGSD.index_copy_(2, position, v_BGD[:, :, None].to(values_BGSD.dtype))
    grouped = _wide(q).unflatten(1, (keys_BGSD.shape[1], -1))
    scores = torch.einsum("bgrd,bgsd->bgrs", grouped, _wide(keys_BGSD)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = _seen(keys_BGSD.shape[2], position, first_B, window)
    weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    # what no token wrote yet may be anything; nothing of it may come through as 0 · NaN
    held = _wide(values_BGSD).masked_fill(~seen[:, None, :, None], 0.0)
    return torch.einsum("bgrs,bgsd->bgrd", weights, held).flatten(1).to(q_BHD.dtype)


def rotate(value_BHD: Tensor, cos_BR: Tensor, sin_BR: Tensor) -> Tensor:
    """The first R dimensions turned by the angles, in the value's type; the rest as it is."""
    turned, rest = _wide(value_BHD).tensor_split([cos_BR.shape[-1]], -1)
    low, high = turned.chunk(2, -1)
    turned = turned * _wide(cos_BR)[:, None] + torch.cat([-high, low], -1) * _wide(sin_BR)[:, None]
    return torch.cat([turned, rest], -1).to(value_BHD.dtype)


def mix(projected_BW: Tensor, weights: MixerWeights, conv_BTC: Tensor, state_BHPN: Tensor) -> Tensor:
    """What a mixer does between ``in_proj``'s output [B, width] and ``out_proj``'s input [B, I].

    The convolution's window and the state are updated in place.
    """
    dims, rows, wide = weights.dims, weights.dims.rows, _wide(projected_BW)
    fed = projected_BW[:, None, rows["x"].start : rows["C"].stop]
    mixed, _ = reference.causal_conv(_wide(fed), weights.conv, weights.conv_bias, conv_BTC)
    conv_BTC.copy_(torch.cat([conv_BTC[:, 1:], fed.to(conv_BTC.dtype)], 1))
    x, b, c = (t.unflatten(-1, (-1, dims.head_dim)) for t in mixed[:, 0].split([dims.compact] * 2 + [dims.inner], -1))
    if weights.b_norm is not None and weights.c_norm is not None:
        b, c = (reference.rms_norm(t, dims.eps) * _wide(n) for t, n in ((b, weights.b_norm), (c, weights.c_norm)))
    x, b = (t.repeat_interleave(dims.heads // dims.kv_heads, 1) for t in (x, b))
    dt = F.softplus(wide[:, rows["dt"]] + weights.dt_bias)
    y, after = reference.ssd_step(state_BHPN, x, dt, weights.a, b, c, weights.d)
    state_BHPN.copy_(after)
    normed = reference.gated_rms_norm(y.flatten(1), wide[:, rows["z"]], _wide(weights.norm), dims.heads, dims.eps)
    return normed.to(projected_BW.dtype)


def argmax(logits_BV: Tensor, out_B: Tensor) -> None:
    """Writes where each row's greatest logit stands, the first of equals, into int64 ``out``."""
    torch.argmax(logits_BV, -1, out=out_B)


PLAIN = StepOps(attend, mix, project, advance, argmax)


def _projected(x: Tensor, part: Projection) -> Tensor:
    value = _linear(x, part.weight, part.bias)
    if part.gate is None:
        return activated(value, part.activation)
    return activated(_linear(x, part.gate, part.gate_bias), part.activation) * value


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _seen(slots: int, position: Tensor, first_B: Tensor, window: int | None) -> Tensor:
    """Which slots each row attends to, [B, S]."""
    slot = torch.arange(slots, device=position.device)
    begin = first_B if window is None else torch.maximum(first_B, position - window + 1)
    return (slot >= begin[:, None]) & (slot <= position)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
