"""``advance``'s first half in Triton: products of several inputs added to the residual, in one launch.

One sequence: each program goes through all terms of ``n`` outputs. Several: each sums over one chunk of one term by
tensor cores, because outputs alone are too few to fill a device; the kernel that makes the next norm adds the chunks.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.ops.step_device import release, wait
from pipeline.ops.step_products import (
    TENSOR_ROWS,
    Tile,
    biased,
    block_starts,
    dot_rows,
    launch_options,
    number_of_part,
    of_part,
    padded_rows,
    tile_of,
)
from pipeline.ops.stepping import Term

# As `project`'s, for longer rows.
REDUCE_ROW = Tile(n=4, k=2048, warps=4)
REDUCE_ROWS = Tile(n=64, k=128, warps=4, stages=4, chunk=2560)
REDUCE_MANY = Tile(n=64, k=64, warps=4, stages=5, chunk=2560)


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
    x, weight, size = of_part(xs, chunk, STARTS), of_part(weights, chunk, STARTS), number_of_part(SIZES, chunk, STARTS)
    begin = (chunk - number_of_part(STARTS, chunk, STARTS)) * CHUNK
    end = tl.minimum(begin + CHUNK, size)
    y = dot_rows(x, weight, row, begin, end, B, N, size, M, BLOCK_N, BLOCK_K, STAGES, PDL)
    at = (chunk * B + batch)[:, None] * N + row[None, :]
    tl.store(sums + at, y, mask=(batch < B)[:, None] & (row < N)[None, :])


def reduce(residual_BN: Tensor, terms: Sequence[Term], pdl: bool) -> Tensor:
    """``residual + Σ_j (x_j W_j^T + b_j)`` [B, N] of one row; more than ``ROWS`` rows are torch's."""
    if len(residual_BN) > 1:
        return _torch_reduce(residual_BN, terms)
    residual_BN, out = residual_BN.contiguous(), torch.empty_like(residual_BN)
    grid, held, launch = _launch(terms, REDUCE_ROW, pdl)
    reduce_row[grid](residual_BN, *held, tuple(t.bias for t in terms), out, **launch)
    return out


def chunk_sums(terms: Sequence[Term], pdl: bool) -> Tensor:
    """Of up to ``ROWS`` rows the products of each chunk of the terms' inputs [chunks, B, N], in float32."""
    rows = len(terms[0].x)
    tile = REDUCE_ROWS if rows <= TENSOR_ROWS else REDUCE_MANY
    grid, held, launch = _launch(terms, tile, pdl)
    starts = block_starts(launch["SIZES"], tile.chunk)
    sums = torch.empty(starts[-1], rows, launch["N"], dtype=torch.float32, device=held[0][0].device)
    tiles = {"STARTS": starts, "CHUNK": tile.chunk, "M": padded_rows(rows), "STAGES": tile.stages}
    reduce_rows[(*grid, starts[-1])](*held, sums, rows, **tiles, **launch)
    return sums


def _launch(terms: Sequence[Term], tile: Tile, pdl: bool) -> tuple[tuple[int], list[Any], dict[str, Any]]:
    """Programs for the outputs, inputs and weights, and the options."""
    xs, weights = tuple(t.x.contiguous() for t in terms), tuple(t.weight for t in terms)
    size = len(weights[0])
    launch = {"N": size, "SIZES": tuple(x.shape[1] for x in xs), "BLOCK_N": tile.n, "BLOCK_K": tile.columns(xs[0])}
    launch |= launch_options(tile.warps, pdl)
    return (triton.cdiv(size, tile.n),), [xs, weights], launch


def _torch_reduce(residual_BN: Tensor, terms: Sequence[Term]) -> Tensor:
    for term in terms:
        base = residual_BN if term.bias is None else residual_BN + term.bias
        residual_BN = torch.addmm(base, term.x, term.weight.t())
    return residual_BN
