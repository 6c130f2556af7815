"""The Mamba-2 operations in plain torch: what they mean. Differentiable, any device, any head dimension.

Shapes: B batch, L length, H heads, P head dimension (value), N state dimension (key), K kernel width, C channels.
The scan is the state-space dual of Dao & Gu 2024 (arXiv 2405.21060), listing 1, with one B and C per head:
``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T``, ``y_t = h_t C_t + D x_t``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd_scan(
    x_BLHP: Tensor, dt_BLH: Tensor, a_H: Tensor, b_BLHN: Tensor, c_BLHN: Tensor, d_H: Tensor, chunk: int = 128
) -> tuple[Tensor, Tensor]:
    """Output [B, L, H, P] in x's type and final state [B, H, P, N] in float32, from a zero state.

    ``dt`` is positive (after softplus), ``a`` negative. Quadratic within a chunk, linear over chunks.
    """
    batch, length, heads, width = x_BLHP.shape
    chunk = min(chunk, length)
    pad = -length % chunk
    # dt = 0 at the padding: it neither decays nor feeds the state
    x, dt, b, c = (_pad(t.float(), pad) for t in (x_BLHP, dt_BLH, b_BLHN, c_BLHN))
    x_in = (x * dt[..., None]).unflatten(1, (-1, chunk))
    b, c = b.unflatten(1, (-1, chunk)), c.unflatten(1, (-1, chunk))
    decay_BHQL = (dt * a_H.float()).unflatten(1, (-1, chunk)).permute(0, 3, 1, 2).cumsum(-1)

    # within each chunk: masked, decayed attention
    span = decay_BHQL[..., :, None] - decay_BHQL[..., None, :]
    keep = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    weights = torch.einsum("bqlhn,bqshn->bhqls", c, b) * span.masked_fill(~keep, -torch.inf).exp()
    y = torch.einsum("bhqls,bqshp->bqlhp", weights, x_in)

    # between chunks: the recurrence on one state a chunk
    to_end = (decay_BHQL[..., -1:] - decay_BHQL).exp()
    update_QBHPN = torch.einsum("bqlhn,bhql,bqlhp->qbhpn", b, to_end, x_in)
    state = x.new_zeros(batch, heads, width, b.shape[-1])
    before = []
    for q in range(update_QBHPN.shape[0]):
        before.append(state)
        state = state * decay_BHQL[:, :, q, -1].exp()[..., None, None] + update_QBHPN[q]
    if len(before) > 1:
        y = y + torch.einsum("bqlhn,qbhpn,bhql->bqlhp", c, torch.stack(before), decay_BHQL.exp())
    y = y.flatten(1, 2)[:, :length] + d_H.float()[:, None] * x_BLHP.float()
    return y.to(x_BLHP.dtype), state


def _pad(tensor: Tensor, pad: int) -> Tensor:
    return F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, pad)) if pad else tensor


def causal_conv(x_BLC: Tensor, weight_CK: Tensor, bias_C: Tensor) -> Tensor:
    """Causal depthwise convolution followed by SiLU: [B, L, C] to [B, L, C], zeros before the first token."""
    kernel = weight_CK.shape[1]
    padded = F.pad(x_BLC, (0, 0, kernel - 1, 0))
    length = x_BLC.shape[1]
    out = bias_C + sum(padded[:, k : k + length] * weight_CK[:, k] for k in range(kernel))
    return F.silu(out)


def conv_step(window_BCK: Tensor, weight_CK: Tensor, bias_C: Tensor) -> Tensor:
    """The convolution's output [B, C] for the last of the K newest inputs."""
    return F.silu((window_BCK * weight_CK).sum(-1) + bias_C)


def ssd_step(
    state_BHPN: Tensor, x_BHP: Tensor, dt_BH: Tensor, a_H: Tensor, b_BHN: Tensor, c_BHN: Tensor, d_H: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: output [B, H, P] and the next state (float32)."""
    x, dt = x_BHP.float(), dt_BH.float()
    fed = torch.einsum("bhp,bhn->bhpn", x * dt[..., None], b_BHN.float())
    state = state_BHPN * (dt * a_H.float()).exp()[..., None, None] + fed
    y = torch.einsum("bhpn,bhn->bhp", state, c_BHN.float()) + d_H.float()[:, None] * x
    return y.to(x_BHP.dtype), state


def gated_rms_norm(y_BLD: Tensor, z_BLD: Tensor, weight_D: Tensor, heads: int, eps: float) -> Tensor:
    """``RMSNorm(y · SiLU(z)) · weight`` with one root mean square per head."""
    gated = (y_BLD.float() * F.silu(z_BLD.float())).unflatten(-1, (heads, -1))
    normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
    return (normed.flatten(-2) * weight_D.float()).to(y_BLD.dtype)
