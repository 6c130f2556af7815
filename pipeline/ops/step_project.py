"""``project`` of a decoding step in Triton: the norm and all products of it, at the speed of the weights' bytes.

One sequence: each program multiplies ``n`` rows of a weight with the whole input in float32 and recomputes the input's
norm, which costs less than a kernel of its own. Several: tensor cores, and the norm once before. Parts are separate
pointers in one launch: nothing is copied.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pipeline.ops import stepping
from pipeline.ops.step_device import activated, release, wait
from pipeline.ops.step_products import (
    ROWS,
    TENSOR_ROWS,
    Tile,
    biased,
    block_starts,
    dot_rows,
    launch_options,
    padded_rows,
    tile_of,
)
from pipeline.ops.stepping import LayerNorm, Norm, Projection, RmsNorm

# The best of a dozen each on an H200, at Phi-2's sizes. One sequence: eight inputs a thread are 16 bytes of a weight's
# row; with k = 256 a warp the input lies in the threads that need it, and nothing is exchanged.
PROJECT_ROW = Tile(n=8, k=1024, warps=4)
PROJECT_ROWS = Tile(n=64, k=128, warps=4, stages=3)
PROJECT_MANY = Tile(n=64, k=64, warps=4, stages=4)


@triton.jit
def _moments(x, eps, K: tl.constexpr, NORM: tl.constexpr, WHOLE: tl.constexpr):
    """What the norm subtracts and multiplies by, of x [K]."""
    at = tl.arange(0, WHOLE)
    value = tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)
    mean = tl.sum(value, 0) / K if NORM == "layer" else 0.0
    centred = tl.where(at < K, value - mean, 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / K + eps)


@triton.jit
def _normed(x, weight, bias, mean, scale, at, K: tl.constexpr, NORM: tl.constexpr):
    """The normed input at some columns, in float32."""
    value = tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)
    if NORM is not None:
        value = (value - mean) * scale * tl.load(weight + at, mask=at < K, other=0.0).to(tl.float32)
        if bias is not None:
            value += tl.load(bias + at, mask=at < K, other=0.0).to(tl.float32)
    return value


@triton.jit
def _part_of_row(
    block, x, norm_weight, norm_bias, eps, weight, bias, gate, gate_bias, out,
    N: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, col = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    tile = tile_of(weight, row, col, 0, N, K)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    if gate is not None:
        gate_tile = tile_of(gate, row, col, 0, N, K)
        gate_total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    wait(PDL)
    mean, scale = 0.0, 1.0
    if NORM is not None:
        mean, scale = _moments(x, eps, K, NORM, WHOLE)
    for begin in tl.static_range(0, K, BLOCK_K):
        after = tile
        if begin + BLOCK_K < K:
            after = tile_of(weight, row, col, begin + BLOCK_K, N, K)
        value = _normed(x, norm_weight, norm_bias, mean, scale, begin + col, K, NORM)[None, :]
        total += tile.to(tl.float32) * value
        tile = after
        if gate is not None:
            gate_total += gate_tile.to(tl.float32) * value
            if begin + BLOCK_K < K:
                gate_tile = tile_of(gate, row, col, begin + BLOCK_K, N, K)
    y = biased(tl.sum(total, 1), bias, row, N)
    if gate is not None:
        y *= activated(biased(tl.sum(gate_total, 1), gate_bias, row, N), ACTIVATION)
    else:
        y = activated(y, ACTIVATION)
    tl.store(out + row, y.to(out.dtype.element_ty), mask=row < N)


@triton.jit
def project_row(
    x, norm_weight, norm_bias, eps, weights, biases, gates, gate_biases, outs,
    SIZES: tl.constexpr, STARTS: tl.constexpr, ACTIVATIONS: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """All parts of one row; programs from ``STARTS[i]`` on belong to part i."""
    release(PDL)
    block = tl.program_id(0)
    for i in tl.static_range(len(weights)):
        if (block >= STARTS[i]) & (block < STARTS[i + 1]):
            _part_of_row(
                block - STARTS[i], x, norm_weight, norm_bias, eps, weights[i], biases[i], gates[i], gate_biases[i],
                outs[i], SIZES[i], K, NORM, tl.constexpr(ACTIVATIONS[i]), WHOLE, BLOCK_N, BLOCK_K, PDL,
            )  # fmt: skip


@triton.jit
def normalise_rows(
    x, weight, bias, eps, out, K: tl.constexpr, NORM: tl.constexpr, WHOLE: tl.constexpr, PDL: tl.constexpr
):
    """One program a row [K]."""
    release(PDL)
    x += tl.program_id(0) * K
    at = tl.arange(0, WHOLE)
    wait(PDL)
    mean, scale = _moments(x, eps, K, NORM, WHOLE)
    value = _normed(x, weight, bias, mean, scale, at, K, NORM)
    tl.store(out + tl.program_id(0) * K + at, value.to(out.dtype.element_ty), mask=at < K)


@triton.jit
def _part_of_rows(
    block, x, weight, bias, gate, gate_bias, out, B,
    N: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, batch = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, M)
    y = biased(dot_rows(x, weight, row, 0, K, B, N, K, M, BLOCK_N, BLOCK_K, STAGES, PDL), bias, row, N)
    if gate is not None:
        opened = biased(dot_rows(x, gate, row, 0, K, B, N, K, M, BLOCK_N, BLOCK_K, STAGES, PDL), gate_bias, row, N)
        y *= activated(opened, ACTIVATION)
    else:
        y = activated(y, ACTIVATION)
    inside = (batch < B)[:, None] & (row < N)[None, :]
    tl.store(out + batch[:, None] * N + row[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def project_rows(
    x, weights, biases, gates, gate_biases, outs, B,
    SIZES: tl.constexpr, STARTS: tl.constexpr, ACTIVATIONS: tl.constexpr, K: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """All parts of B rows that are normed already; programs from ``STARTS[i]`` on belong to part i."""
    release(PDL)
    block = tl.program_id(0)
    for i in tl.static_range(len(weights)):
        if (block >= STARTS[i]) & (block < STARTS[i + 1]):
            _part_of_rows(
                block - STARTS[i], x, weights[i], biases[i], gates[i], gate_biases[i], outs[i], B,
                SIZES[i], K, tl.constexpr(ACTIVATIONS[i]), M, BLOCK_N, BLOCK_K, STAGES, PDL,
            )  # fmt: skip


def project(x_BK: Tensor, norm: Norm | None, parts: Sequence[Projection], pdl: bool) -> list[Tensor]:
    """As ``stepping.project``; several rows round the normed input to their type, beyond ``ROWS`` torch computes."""
    rows, size = x_BK.shape
    if rows > ROWS:
        return _torch_project(x_BK, norm, parts)
    tile = PROJECT_ROW if rows == 1 else PROJECT_ROWS if rows <= TENSOR_ROWS else PROJECT_MANY
    x_BK, sizes = x_BK.contiguous(), tuple(len(p.weight) for p in parts)
    starts = block_starts(sizes, tile.n)
    columns = [tuple(getattr(p, name) for p in parts) for name in ("weight", "bias", "gate", "gate_bias")]
    outs = tuple(x_BK.new_empty(rows, n) for n in sizes)
    shape = {"SIZES": sizes, "STARTS": starts, "ACTIVATIONS": tuple(p.activation for p in parts), "K": size}
    launch: dict[str, Any] = {
        **shape,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.columns(x_BK),
        **launch_options(tile.warps, pdl),
    }
    if rows == 1:
        weight, bias, eps, kind = _norm_arguments(norm)
        whole = triton.next_power_of_2(size)
        project_row[(starts[-1],)](x_BK, weight, bias, eps, *columns, outs, NORM=kind, WHOLE=whole, **launch)
    else:
        normed = x_BK if norm is None else normalise(x_BK, norm, pdl)
        tiles = {"M": padded_rows(rows), "STAGES": tile.stages}
        project_rows[(starts[-1],)](normed, *columns, outs, rows, **tiles, **launch)
    return list(outs)


def normalise(x_BK: Tensor, norm: Norm, pdl: bool) -> Tensor:
    """The normed input, in x's type."""
    (rows, size), out = x_BK.shape, torch.empty_like(x_BK)
    weight, bias, eps, kind = _norm_arguments(norm)
    shape = {"K": size, "NORM": kind, "WHOLE": triton.next_power_of_2(size)}
    normalise_rows[(rows,)](x_BK, weight, bias, eps, out, **shape, **launch_options(4, pdl))
    return out


def _norm_arguments(norm: Norm | None) -> tuple[Tensor | None, Tensor | None, float, str | None]:
    if norm is None:
        return None, None, 0.0, None
    if isinstance(norm, RmsNorm):
        return norm.weight, None, norm.eps, "rms"
    return norm.weight, norm.bias, norm.eps, "layer"


def _torch_project(x_BK: Tensor, norm: Norm | None, parts: Sequence[Projection]) -> list[Tensor]:
    if isinstance(norm, LayerNorm):
        x_BK = F.layer_norm(x_BK, x_BK.shape[-1:], norm.weight, norm.bias, norm.eps)
    elif norm is not None:
        x_BK = stepping.normalise(x_BK, norm).to(x_BK.dtype)
    found = []
    for part in parts:
        value = F.linear(x_BK, part.weight, part.bias)
        opened = value if part.gate is None else F.linear(x_BK, part.gate, part.gate_bias)
        opened = stepping.activated(opened, part.activation)
        found.append(opened if part.gate is None else opened * value)
    return found
