"""What the products of a decoding step share: tiles of a weight, and dot products of several rows.

One row is multiplied in float32, element by element; tensor cores take sixteen for the price of one. A tile is always
asked for before the last one is used, the first before the kernel waits for its inputs: weights are never written.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pipeline.ops.step_device import wait

# Rows up to which these kernels serve better than torch's products, and up to which one tile of tensor cores holds all.
ROWS, TENSOR_ROWS = 64, 16


@dataclass(frozen=True)
class Tile:
    """Rows and columns (of two bytes) that a program holds at a time, its warps, and tiles on their way."""

    n: int
    k: int
    warps: int
    stages: int = 1

    def columns(self, like: Tensor) -> int:
        """As many as have the bytes that the tile was chosen for; of float32 twice as many would not fit."""
        return self.k * 2 // like.element_size()


@triton.jit
def tile_of(weight, row, col, begin, N: tl.constexpr, K: tl.constexpr):
    """Rows by columns of a weight [N, K] from column ``begin``; each is read once, so it may leave the cache first."""
    inside = (row < N)[:, None] & (begin + col < K)[None, :]
    at = row.to(tl.int64)[:, None] * K + (begin + col)[None, :]
    return tl.load(weight + at, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def biased(value, bias, row, N: tl.constexpr):
    """The value plus the bias of its rows, if there is one."""
    if bias is not None:
        value += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
    return value


@triton.jit
def _inputs(x, batch, col, end, B, K: tl.constexpr):
    inside = (batch < B)[:, None] & (col < end)[None, :]
    return tl.load(x + batch[:, None] * K + col[None, :], mask=inside, other=0.0)


@triton.jit
def dot_rows(
    x, weight, row, begin, end, B, N: tl.constexpr, K: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """X [B, K] times rows of the weight over the columns from ``begin`` to ``end``: [M, BLOCK_N] in float32."""
    batch, col = tl.arange(0, M), tl.arange(0, BLOCK_K)
    tile = tile_of(weight, row, col, begin, N, K)
    wait(PDL)
    total = tl.zeros([M, BLOCK_N], tl.float32)
    total = tl.dot(_inputs(x, batch, begin + col, end, B, K), tl.trans(tile), total, input_precision="ieee")
    for k in tl.range(begin + BLOCK_K, end, BLOCK_K, num_stages=STAGES):
        tile = tile_of(weight, row, col, k, N, K)
        total = tl.dot(_inputs(x, batch, k + col, end, B, K), tl.trans(tile), total, input_precision="ieee")
    return total


def launch_options(warps: int, pdl: bool) -> dict[str, Any]:
    """What every launch says: threads, and whether it may start early."""
    return {"PDL": pdl, "num_warps": warps, "launch_pdl": pdl}


def block_starts(sizes: Sequence[int], block: int) -> tuple[int, ...]:
    """The first block of each size, and the number of all."""
    return tuple(itertools.accumulate((triton.cdiv(n, block) for n in sizes), initial=0))


def padded_rows(rows: int) -> int:
    """Rows of a tile of tensor cores."""
    return int(max(16, triton.next_power_of_2(rows)))
