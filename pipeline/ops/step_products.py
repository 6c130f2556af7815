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
# Tiles of one row's products that are on their way at a time.
AHEAD = tl.constexpr(2)


@dataclass(frozen=True)
class Tile:
    """Rows and columns (of two bytes) that a program holds at a time, its warps, and tiles on their way.

    ``chunk`` are the columns that a program goes through where several share a row, a multiple of ``k``.
    """

    n: int
    k: int
    warps: int
    stages: int = 1
    chunk: int = 0

    def columns(self, like: Tensor) -> int:
        """As many as have the bytes that the tile was chosen for; of float32 twice as many would not fit."""
        return self.k * 2 // like.element_size()

    def widths(self, size: int, like: Tensor) -> tuple[int, ...]:
        """The columns of each tile of a row: the last ones are a power of two as well, but not more than need be."""
        most = self.columns(like)
        whole, rest = divmod(size, most)
        return (most,) * whole + ((int(triton.next_power_of_2(rest)),) if rest else ())


@triton.jit
def tile_of(weight, row, col, begin, N, K):
    """Rows by columns of a weight [N, K] from column ``begin``; each is read once, so it may leave the cache first."""
    inside = (row < N)[:, None] & (begin + col < K)[None, :]
    at = row.to(tl.int64)[:, None] * K + (begin + col)[None, :]
    return tl.load(weight + at, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def of_part(options, block, STARTS: tl.constexpr):
    """What the part of this program has of the options, one a part."""
    found = options[0]
    for i in tl.static_range(1, len(STARTS) - 1):
        found = tl.where(block >= STARTS[i], options[i], found)
    return found


@triton.jit
def number_of_part(numbers: tl.constexpr, block, STARTS: tl.constexpr):
    """The same of numbers that are compiled in."""
    found = block * 0 + numbers[0]
    for i in tl.static_range(1, len(STARTS) - 1):
        found = tl.where(block >= STARTS[i], numbers[i], found)
    return found


@triton.jit
def biased_part(value, biases, block, row, size, STARTS: tl.constexpr, GIVEN: tl.constexpr):
    """The value plus its part's bias of some rows, where ``GIVEN`` says that there is one."""
    if biases is not None:
        inside = (row < size) & (number_of_part(GIVEN, block, STARTS) > 0)
        value += tl.load(of_part(biases, block, STARTS) + row, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def begin_of(WIDTHS: tl.constexpr, i: tl.constexpr):
    """The first column of tile i of a row."""
    begin: tl.constexpr = 0
    for before in tl.static_range(i):
        begin += WIDTHS[before]
    return begin


@triton.jit
def _tile(weight, row, N, K: tl.constexpr, WIDTHS: tl.constexpr, i: tl.constexpr):
    return tile_of(weight, row, tl.arange(0, WIDTHS[i]), begin_of(WIDTHS, i), N, K)


@triton.jit
def first_tiles(weight, row, N, K: tl.constexpr, WIDTHS: tl.constexpr):
    """The first tiles of rows, as many as are on their way at a time."""
    tiles = ()
    for i in tl.static_range(min(AHEAD, len(WIDTHS))):
        tiles = tiles + (_tile(weight, row, N, K, WIDTHS, i),)  # type: ignore[assignment]  # noqa: RUF005
    return tiles


@triton.jit
def next_tiles(tiles, weight, row, N, K: tl.constexpr, WIDTHS: tl.constexpr, i: tl.constexpr):
    """The tiles and another one, which is asked for before tile i is used."""
    if i + AHEAD < len(WIDTHS):
        tiles = tiles + (_tile(weight, row, N, K, WIDTHS, i + AHEAD),)  # noqa: RUF005
    return tiles


@triton.jit
def biased(value, bias, row, N):
    """The value plus the bias of its rows, if there is one."""
    if bias is not None:
        value += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
    return value


@triton.jit
def _inputs(x, batch, col, end, B, K):
    inside = (batch < B)[:, None] & (col < end)[None, :]
    return tl.load(x + batch[:, None] * K + col[None, :], mask=inside, other=0.0)


@triton.jit
def dot_rows(
    x, weight, row, begin, end, B, N, K, M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
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


def filled(tensors: Sequence[Tensor | None]) -> tuple[tuple[Tensor, ...] | None, tuple[int, ...]]:
    """The tensors, another one where there is none, and 1 for those that there are; None if there are none at all."""
    known = [t for t in tensors if t is not None]
    given = tuple(int(t is not None) for t in tensors)
    return (tuple(known[0] if t is None else t for t in tensors) if known else None), given


def launch_options(warps: int, pdl: bool) -> dict[str, Any]:
    """What every launch says: threads, and whether it may start early."""
    return {"PDL": pdl, "num_warps": warps, "launch_pdl": pdl}


def block_starts(sizes: Sequence[int], block: int) -> tuple[int, ...]:
    """The first block of each size, and the number of all."""
    return tuple(itertools.accumulate((triton.cdiv(n, block) for n in sizes), initial=0))


def padded_rows(rows: int) -> int:
    """Rows of a tile of tensor cores."""
    return int(max(16, triton.next_power_of_2(rows)))
