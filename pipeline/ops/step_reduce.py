"""``reduce`` of a decoding step in Triton: products of several inputs added to the residual, in one launch.

One sequence: each program goes through all terms of ``n`` outputs. Several: each sums over one chunk of one term by
tensor cores, because outputs alone are too few to fill a device, and a second kernel adds the chunks in a fixed order.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.ops.step_device import release, wait
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
from pipeline.ops.stepping import Term

# As `project`'s, for longer rows.
REDUCE_ROW = Tile(n=2, k=4096, warps=4)
REDUCE_ROWS = Tile(n=32, k=256, warps=4, stages=3)
REDUCE_MANY = Tile(n=64, k=64, warps=4, stages=4)
# Inputs that one program sums over, for several sequences; a multiple of the tile's k.
CHUNK = 1280
SUM_BLOCK = 512


@triton.jit
def reduce_row(
    residual, xs, weights, biases, out,
    N: tl.constexpr, SIZES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: each program goes through all terms of ``BLOCK_N`` outputs."""
    release(PDL)
    row, col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    tile = tile_of(weights[0], row, col, 0, N, SIZES[0])
    wait(PDL)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    y = tl.load(residual + row, mask=row < N, other=0.0).to(tl.float32)
    for j in tl.static_range(len(weights)):
        y = biased(y, biases[j], row, N)
        for begin in tl.static_range(0, tl.constexpr(SIZES[j]), BLOCK_K):
            after = tile
            if begin + BLOCK_K < SIZES[j]:
                after = tile_of(weights[j], row, col, begin + BLOCK_K, N, SIZES[j])
            elif j + 1 < len(weights):
                after = tile_of(weights[j + 1], row, col, 0, N, SIZES[j + 1])
            value = tl.load(xs[j] + begin + col, mask=begin + col < SIZES[j], other=0.0).to(tl.float32)
            total += tile.to(tl.float32) * value[None, :]
            tile = after
    tl.store(out + row, (y + tl.sum(total, 1)).to(out.dtype.element_ty), mask=row < N)


@triton.jit
def reduce_rows(
    xs, weights, sums, B,
    N: tl.constexpr, SIZES: tl.constexpr, STARTS: tl.constexpr, CHUNK: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sums [chunks, B, N] over ``CHUNK`` inputs of one term each; chunks from ``STARTS[j]`` on belong to term j."""
    release(PDL)
    row, batch, chunk = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, M), tl.program_id(1)
    for j in tl.static_range(len(weights)):
        if (chunk >= STARTS[j]) & (chunk < STARTS[j + 1]):
            begin = (chunk - STARTS[j]) * CHUNK
            end = tl.minimum(begin + CHUNK, SIZES[j])
            y = dot_rows(xs[j], weights[j], row, begin, end, B, N, SIZES[j], M, BLOCK_N, BLOCK_K, STAGES, PDL)
            at = (chunk * B + batch)[:, None] * N + row[None, :]
            tl.store(sums + at, y, mask=(batch < B)[:, None] & (row < N)[None, :])


@triton.jit
def add_sums(
    residual, sums, biases, out, B,
    N: tl.constexpr, TERMS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The residual, the biases and the chunks' sums, in this order whatever ended first."""
    release(PDL)
    batch, row = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    y = tl.load(residual + batch * N + row, mask=row < N, other=0.0).to(tl.float32)
    for j in tl.static_range(TERMS):
        y = biased(y, biases[j], row, N)
    for chunk in tl.static_range(CHUNKS):
        y += tl.load(sums + (chunk * B + batch) * N + row, mask=row < N, other=0.0)
    tl.store(out + batch * N + row, y.to(out.dtype.element_ty), mask=row < N)


def reduce(residual_BN: Tensor, parts: Sequence[Term], pdl: bool) -> Tensor:
    """As ``stepping.reduce``; more than ``ROWS`` rows are torch's."""
    rows, size = residual_BN.shape
    if rows > ROWS:
        return _torch_reduce(residual_BN, parts)
    residual_BN, xs = residual_BN.contiguous(), tuple(p.x.contiguous() for p in parts)
    weights, biases, sizes = tuple(p.weight for p in parts), tuple(p.bias for p in parts), tuple(x.shape[1] for x in xs)
    out = torch.empty_like(residual_BN)
    tile = REDUCE_ROW if rows == 1 else REDUCE_ROWS if rows <= TENSOR_ROWS else REDUCE_MANY
    launch: dict[str, Any] = {"N": size, "SIZES": sizes, "BLOCK_N": tile.n, "BLOCK_K": tile.columns(out)}
    launch |= launch_options(tile.warps, pdl)
    blocks = triton.cdiv(size, tile.n)
    if rows == 1:
        reduce_row[(blocks,)](residual_BN, xs, weights, biases, out, **launch)
        return out
    starts = block_starts(sizes, CHUNK)
    sums = torch.empty(starts[-1], rows, size, dtype=torch.float32, device=out.device)
    tiles = {"STARTS": starts, "CHUNK": CHUNK, "M": padded_rows(rows), "STAGES": tile.stages}
    reduce_rows[(blocks, starts[-1])](xs, weights, sums, rows, **tiles, **launch)
    grid = (rows, triton.cdiv(size, SUM_BLOCK))
    add_sums[grid](
        residual_BN, sums, biases, out, rows,
        N=size, TERMS=len(biases), CHUNKS=starts[-1], BLOCK=SUM_BLOCK, **launch_options(4, pdl),
    )  # fmt: skip
    return out


def _torch_reduce(residual_BN: Tensor, parts: Sequence[Term]) -> Tensor:
    for part in parts:
        base = residual_BN if part.bias is None else residual_BN + part.bias
        residual_BN = torch.addmm(base, part.x, part.weight.t())
    return residual_BN
