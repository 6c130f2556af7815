"""The gated norm of a mixer in Triton, forward and backward; imported only by whoever chose the kernels.

One pass over memory each way: a program takes some tokens of one head. Means ``reference.gated_rms_norm``.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tokens of one head that a program holds, 16 by 80 numbers in several versions: all stay in registers.
TOKENS = 16
WARPS = 4


@triton.jit
def _gated(y, z):
    """The gated value, SiLU(z), and sigmoid(z)."""
    open_ = 1.0 / (1.0 + tl.exp(-z))
    return y * z * open_, z * open_, open_


@triton.jit
def _inverse_root(gated, inside, eps, SIZE: tl.constexpr):
    """One over the root mean square of each token's head."""
    value = tl.where(inside, gated, 0.0)
    return (1.0 / tl.sqrt(tl.sum(value * value, 1) / SIZE + eps))[:, None]


@triton.jit
def _here(tokens, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The program's tokens [ROWS, 1], channels [1, BLOCK] of its head, and which of them there are."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    return token, tl.program_id(1) * SIZE + at, (token < tokens) & (at < SIZE)


@triton.jit
def norm_forward(
    y, z, weight, out, tokens, z_stride, eps,
    INNER: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``out`` of tokens [tokens, INNER]; ``z`` has rows ``z_stride`` apart."""
    token, channel, inside = _here(tokens, SIZE, BLOCK, ROWS)
    gated, _, _ = _gated(
        tl.load(y + token * INNER + channel, mask=inside, other=0.0).to(tl.float32),
        tl.load(z + token * z_stride + channel, mask=inside, other=0.0).to(tl.float32),
    )
    scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    value = gated * _inverse_root(gated, inside, eps, SIZE) * scale
    tl.store(out + token * INNER + channel, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward(
    y, z, weight, grad, grad_y, grad_z, grad_weight, tokens, z_stride, eps,
    INNER: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of y and z, and of the weight the sum over the program's tokens [programs, INNER]."""
    token, channel, inside = _here(tokens, SIZE, BLOCK, ROWS)
    value = tl.load(y + token * INNER + channel, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(z + token * z_stride + channel, mask=inside, other=0.0).to(tl.float32)
    back = tl.load(grad + token * INNER + channel, mask=inside, other=0.0).to(tl.float32)
    gated, silu, sigmoid = _gated(value, gate)
    root = _inverse_root(gated, inside, eps, SIZE)
    sums = tl.sum(back * gated * root, 0)[None, :]
    first = tl.program_id(0).to(tl.int64) * INNER
    tl.store(grad_weight + first + channel, sums, mask=channel < (tl.program_id(1) + 1) * SIZE)
    scaled = back * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    along = tl.sum(scaled * gated, 1)[:, None] / SIZE
    flow = root * (scaled - gated * root * root * along)
    tl.store(grad_y + token * INNER + channel, (flow * silu).to(grad_y.dtype.element_ty), mask=inside)
    slope = sigmoid + silu * (1.0 - sigmoid)
    tl.store(grad_z + token * INNER + channel, (flow * value * slope).to(grad_z.dtype.element_ty), mask=inside)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, heads: int, eps: float) -> Tensor:
        y = y.contiguous()
        out, launch = torch.empty_like(y), _launch(y, heads)
        norm_forward[launch.pop("grid")](y, z, weight, out, y.numel() // y.shape[-1], z.stride(-2), eps, **launch)
        ctx.save_for_backward(y, z, weight)
        ctx.heads, ctx.eps = heads, eps
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight = ctx.saved_tensors
        launch = _launch(y, ctx.heads)
        grid, grad = launch.pop("grid"), grads[0].contiguous()
        grad_y, grad_z = torch.empty_like(y), torch.empty_like(y)
        sums = torch.empty(grid[0], y.shape[-1], dtype=torch.float32, device=y.device)
        tokens = y.numel() // y.shape[-1]
        norm_backward[grid](y, z, weight, grad, grad_y, grad_z, sums, tokens, z.stride(-2), ctx.eps, **launch)
        return grad_y, grad_z, sums.sum(0).to(weight.dtype), None, None


def gated_rms_norm(y_BLD: Tensor, z_BLD: Tensor, weight_D: Tensor, heads: int, eps: float) -> Tensor:
    """As ``reference.gated_rms_norm``; rows of z may lie apart, as they do in a larger projection."""
    # one distance between all rows, of all sequences, is what the kernels go by
    even = z_BLD.stride(-1) == 1 and all(
        z_BLD.stride(i) == z_BLD.stride(i + 1) * z_BLD.shape[i + 1] for i in range(z_BLD.dim() - 2)
    )
    out: Tensor = _GatedNorm.apply(y_BLD, z_BLD if even else z_BLD.contiguous(), weight_D, heads, eps)
    return out


def _launch(y: Tensor, heads: int) -> dict[str, Any]:
    inner = y.shape[-1]
    size, tokens = inner // heads, y.numel() // inner
    block = triton.next_power_of_2(size)
    grid = (triton.cdiv(tokens, TOKENS), heads)
    return {"grid": grid, "INNER": inner, "SIZE": size, "BLOCK": block, "ROWS": TOKENS, "num_warps": WARPS}
