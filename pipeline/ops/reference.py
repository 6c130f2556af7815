"""The Mamba-2 operations in plain torch: what they mean. Differentiable, any device, any head dimension.

Shapes: B batch, L length, H heads, P head dimension (value), N state dimension (key), K kernel width, C channels.
The scan is the state-space dual of Dao & Gu 2024 (arXiv 2405.21060), listing 1, with one B and C per head:
``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T``, ``y_t = h_t C_t + D x_t``.

Inputs below float32 are computed in float32. ``seq_idx`` [B, L] numbers the sequences packed in a row, in ascending
order: no state crosses from one to the next, and a given initial state belongs to the first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd_scan(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    a_H: Tensor,
    b_BLHN: Tensor,
    c_BLHN: Tensor,
    d_H: Tensor,
    state_BHPN: Tensor | None = None,
    seq_idx_BL: Tensor | None = None,
    chunk: int = 128,
) -> tuple[Tensor, Tensor]:
    """Output [B, L, H, P] in x's type and final state [B, H, P, N], at least float32.

    ``dt`` is not negative (after softplus), ``a`` negative. Quadratic within a chunk, linear over chunks (Q).
    """
    length = x_BLHP.shape[1]
    chunk = min(chunk, length)
    pad = -length % chunk
    # dt = 0 at the padding: it neither decays nor feeds the state
    x, dt, b, c = (_pad(_wide(t), pad) for t in (x_BLHP, dt_BLH, b_BLHN, c_BLHN))
    x_in = (x * dt[..., None]).unflatten(1, (-1, chunk))
    b, c = b.unflatten(1, (-1, chunk)), c.unflatten(1, (-1, chunk))
    decay_BHQL = (dt * _wide(a_H)).unflatten(1, (-1, chunk)).permute(0, 3, 1, 2).cumsum(-1)
    within, to_end, from_start, carried = _decays(decay_BHQL, _chunked_sequences(seq_idx_BL, pad, chunk))

    # within each chunk: masked, decayed attention
    y = torch.einsum("bhqls,bqshp->bqlhp", torch.einsum("bqlhn,bqshn->bhqls", c, b) * within, x_in)

    # between chunks: the recurrence on one state a chunk
    update_QBHPN = torch.einsum("bqlhn,bhql,bqlhp->qbhpn", b, to_end, x_in)
    state = torch.zeros_like(update_QBHPN[0]) if state_BHPN is None else state_BHPN.to(x.dtype)
    before = []
    for q in range(update_QBHPN.shape[0]):
        before.append(state)
        state = state * carried[:, :, q, None, None] + update_QBHPN[q]
    if len(before) > 1 or state_BHPN is not None:
        y = y + torch.einsum("bqlhn,qbhpn,bhql->bqlhp", c, torch.stack(before), from_start)
    y = y.flatten(1, 2)[:, :length] + _wide(d_H)[:, None] * x[:, :length]
    return y.to(x_BLHP.dtype), state


def _decays(decay_BHQL: Tensor, sequences: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decay between positions of a chunk, from each to its end, from its start to each, and over all of it."""
    chunk = decay_BHQL.shape[-1]
    span = decay_BHQL[..., :, None] - decay_BHQL[..., None, :]
    keep = torch.ones(chunk, chunk, dtype=torch.bool, device=span.device).tril()
    to_end, from_start, carried = (decay_BHQL[..., -1:] - decay_BHQL).exp(), decay_BHQL.exp(), decay_BHQL[..., -1].exp()
    if sequences is not None:
        last = sequences[..., -1:]
        before = torch.cat([sequences[:, :, :1, :1], last[:, :, :-1]], 2)
        keep = keep & (sequences[..., :, None] == sequences[..., None, :])
        to_end, from_start = to_end * (sequences == last), from_start * (sequences == before)
        carried = carried * (last == before)[..., 0]
    return span.masked_fill(~keep, -torch.inf).exp(), to_end, from_start, carried


def _chunked_sequences(seq_idx_BL: Tensor | None, pad: int, chunk: int) -> Tensor | None:
    """[B, 1, Q, L in a chunk]; padding belongs to the last sequence."""
    if seq_idx_BL is None:
        return None
    padded = torch.cat([seq_idx_BL, seq_idx_BL[:, -1:].expand(-1, pad)], 1)
    return padded.unflatten(1, (-1, chunk))[:, None]


def _pad(tensor: Tensor, pad: int) -> Tensor:
    return F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, pad)) if pad else tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def causal_conv(
    x_BLC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor,
    state_BKC: Tensor | None = None,
    seq_idx_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution and SiLU: output [B, L, C] in x's type, and the state after it [B, K-1, C].

    The state holds the last K-1 inputs of the (last) sequence; where there are fewer, and without a state, zeros.
    """
    back, length = weight_CK.shape[1] - 1, x_BLC.shape[1]
    wide, weight = _wide(_after(state_BKC, x_BLC, back)), _wide(weight_CK)
    sequences = None if seq_idx_BL is None else _sequences(seq_idx_BL, back)
    out = bias_C + wide[:, back:] * weight[:, back]
    for k in range(back):
        tap = wide[:, k : k + length] * weight[:, k]
        if sequences is not None:
            tap = tap * (sequences[:, k : k + length] == sequences[:, back:])[..., None]
        out = out + tap
    return F.silu(out).to(x_BLC.dtype), conv_state(x_BLC, back, state_BKC, seq_idx_BL)


def conv_state(x_BLC: Tensor, back: int, state_BKC: Tensor | None = None, seq_idx_BL: Tensor | None = None) -> Tensor:
    """The convolution's state after its inputs alone: the last ``back`` = K-1 of them, as ``causal_conv`` gives it."""
    state = _after(state_BKC, x_BLC[:, -back:], back)[:, -back:]
    if seq_idx_BL is not None:
        state = state * (_sequences(seq_idx_BL, back)[:, -back:] == seq_idx_BL[:, -1:])[..., None]
    return state


def _after(state_BKC: Tensor | None, x_BLC: Tensor, back: int) -> Tensor:
    """The inputs after the state, or after as many zeros."""
    return F.pad(x_BLC, (0, 0, back, 0)) if state_BKC is None else torch.cat([state_BKC.to(x_BLC.dtype), x_BLC], 1)


def _sequences(seq_idx_BL: Tensor, back: int) -> Tensor:
    """The sequence of each input and, before them, of the state's: the first."""
    return torch.cat([seq_idx_BL[:, :1].expand(-1, back), seq_idx_BL], 1)


def ssd_step(
    state_BHPN: Tensor, x_BHP: Tensor, dt_BH: Tensor, a_H: Tensor, b_BHN: Tensor, c_BHN: Tensor, d_H: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: output [B, H, P] in x's type, and the next state in the state's type."""
    x, dt = x_BHP.to(state_BHPN.dtype), dt_BH.to(state_BHPN.dtype)
    fed = torch.einsum("bhp,bhn->bhpn", x * dt[..., None], b_BHN.to(x.dtype))
    state = state_BHPN * (dt * a_H).exp()[..., None, None] + fed
    y = torch.einsum("bhpn,bhn->bhp", state, c_BHN.to(x.dtype)) + d_H[:, None] * x
    return y.to(x_BHP.dtype), state


def gated_rms_norm(y_BLD: Tensor, z_BLD: Tensor, weight_D: Tensor, heads: int, eps: float) -> Tensor:
    """``RMSNorm(y · SiLU(z)) · weight`` with one root mean square per head, in y's type."""
    gated = (_wide(y_BLD) * F.silu(_wide(z_BLD))).unflatten(-1, (heads, -1))
    return (rms_norm(gated, eps).flatten(-2) * weight_D).to(y_BLD.dtype)


def rms_norm(value: Tensor, eps: float) -> Tensor:
    """The value over its root mean square along the last dimension, at least float32."""
    wide = _wide(value)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
