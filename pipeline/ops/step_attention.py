"""``attend`` of a decoding step in Triton: split over the cache's slots, then combined.

The number of splits follows from the device and the number of rows and heads, so that a captured graph's grid is fixed;
their length follows from the position that each program reads, so that all of them work at any position. A key-value
head with one query goes through registers: every row of the tile keeps a softmax of its own, and the loop has no
exchange between threads but a row's sum. With several queries tensor cores share each loaded key. The new key and value
come from registers in the first split, which alone writes them: no program waits for another's write.

Exponentials are of two: scores carry a factor log2(e).
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.ops.step_device import release, tanh, wait

LOG2E = tl.constexpr(1.4426950408889634)
# Finite, so that it can be subtracted from itself; below every score.
LEAST = tl.constexpr(-1.0e30)


@dataclass(frozen=True)
class Tile:
    """Slots that a program holds at a time, its threads, and programs a multiprocessor that run side by side."""

    slots: int
    warps: int
    stages: int
    resident: int


# The best of fourteen each on an H200, at Phi-2's heads: for as many heads as the device has multiprocessors, and for
# few in many splits. Few threads a program wait least for each other; 32 keys and values of 128 are 16 KB a stage.
MANY = Tile(slots=32, warps=1, stages=3, resident=6)
FEW = Tile(slots=32, warps=2, stages=4, resident=4)
# So few heads over so short a cache: most of FEW's splits would be one or two tiles, and some empty.
SHORT = Tile(slots=64, warps=4, stages=2, resident=3)
SHORT_HEADS, SHORT_SLOTS = 32, 2048
MAX_SPLITS = 128
# What there is of them on the devices that the constants are for; asked of the device where there is one.
MULTIPROCESSORS = 132
# The smallest sides of tensor cores' tiles.
DOT = 16


@triton.jit
def _rotated(base, row, dim, cos, sin, inside, D: tl.constexpr, R: tl.constexpr):
    """Rows [rows, D] whose first R dimensions are turned, rounded to their type."""
    at = base + row[:, None] * D
    value = tl.load(at + dim[None, :], mask=inside, other=0.0).to(tl.float32)
    if R > 0:
        low, turned = dim < R // 2, dim < R
        partner = tl.where(low, dim + R // 2, dim - R // 2)
        other = tl.load(at + partner[None, :], mask=inside & turned[None, :], other=0.0).to(tl.float32)
        other = tl.where(low[None, :], -other, other)
        cosine = tl.load(cos + dim, mask=turned, other=1.0).to(tl.float32)
        sine = tl.load(sin + dim, mask=turned, other=0.0).to(tl.float32)
        value = value * cosine[None, :] + other * sine[None, :]
    return value.to(base.dtype.element_ty)


@triton.jit
def _scored(products, scale, softcap: tl.constexpr):
    """Scores in powers of two."""
    score = products * scale
    if softcap is not None:
        score = softcap * tanh(score / softcap)
    return score * LOG2E


@triton.jit
def _pair(keys, values, slot, dim, end, D: tl.constexpr):
    """Keys and values [slots, D] before ``end``; each is read once, so it may leave the cache first."""
    inside = (slot < end)[:, None] & (dim < D)[None, :]
    at = slot[:, None] * D + dim[None, :]
    key = tl.load(keys + at, mask=inside, other=0.0, eviction_policy="evict_first")
    return key, tl.load(values + at, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _attended(
    q, keys, values, begin, end, scale, softcap: tl.constexpr,
    D: tl.constexpr, DIM: tl.constexpr, M: tl.constexpr, SLOTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Greatest scores [M], sums of weights [M] and weighted values [M, DIM] of M queries [M, DIM]."""
    dim = tl.arange(0, DIM)
    best = tl.full([M], LEAST, tl.float32)
    total, mixed = tl.zeros([M], tl.float32), tl.zeros([M, DIM], tl.float32)
    for at in tl.range(begin, end, SLOTS, num_stages=STAGES):
        slot = at + tl.arange(0, SLOTS)
        key, value = _pair(keys, values, slot, dim, end, D)
        score = _scored(tl.dot(q, tl.trans(key), input_precision="ieee"), scale, softcap)
        score = tl.where((slot < end)[None, :], score, float("-inf"))
        after = tl.maximum(best, tl.max(score, 1))
        decay, weight = tl.exp2(best - after), tl.exp2(score - after[:, None])
        total = total * decay + tl.sum(weight, 1)
        mixed = tl.dot(weight.to(value.dtype), value, mixed * decay[:, None], input_precision="ieee")
        best = after
    return best, total, mixed


@triton.jit
def attend_splits(
    q, k, v, cos, sin, cos_row, sin_row, keys, values, position, first, out, bests, totals, parts, slots, scale,
    softcap: tl.constexpr, WINDOW: tl.constexpr, GROUPS: tl.constexpr, REPEAT: tl.constexpr, M: tl.constexpr,
    D: tl.constexpr, DIM: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr, SLOTS: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One split of one key-value head of one sequence, for its ``REPEAT`` queries."""
    group, split = tl.program_id(0), tl.program_id(1)
    batch = group // GROUPS
    row, dim = tl.arange(0, M), tl.arange(0, DIM)
    keys += group.to(tl.int64) * slots * D
    values += group.to(tl.int64) * slots * D
    inside = (row < REPEAT)[:, None] & (dim < D)[None, :]
    wait(PDL)
    here, low = tl.load(position).to(tl.int32), tl.load(first + batch).to(tl.int32)
    if WINDOW is not None:
        low = tl.maximum(low, here - WINDOW + 1)
    if R > 0:
        cos += batch * cos_row
        sin += batch * sin_row
    query = _rotated(q + group * REPEAT * D, row, dim, cos, sin, inside, D, R)
    high = here + 1 if k is None else here
    length = tl.cdiv(tl.cdiv(high - low, SPLITS), SLOTS) * SLOTS
    begin = low + split * length
    end = tl.minimum(begin + length, high)
    best, total, mixed = _attended(query, keys, values, begin, end, scale, softcap, D, DIM, M, SLOTS, STAGES)
    release(PDL)  # not before: the next kernel's programs would take room from this one's
    if k is not None:
        one, writes = tl.arange(0, 1), (dim < D)[None, :] & (split == 0)
        key = _rotated(k + group * D, one, dim, cos, sin, (dim < D)[None, :], D, R)
        value = tl.load(v + group * D + dim, mask=dim < D, other=0.0)[None, :]
        tl.store(keys + here.to(tl.int64) * D + dim[None, :], key, mask=writes)
        tl.store(values + here.to(tl.int64) * D + dim[None, :], value, mask=writes)
        score = _scored(tl.sum(query.to(tl.float32) * key.to(tl.float32), 1), scale, softcap)
        score = tl.where(split == 0, score, float("-inf"))
        after = tl.maximum(best, score)
        decay, weight = tl.exp2(best - after), tl.exp2(score - after)
        total = total * decay + weight
        mixed = mixed * decay[:, None] + weight[:, None] * value.to(tl.float32)
        best = after
    head = group * REPEAT + row
    if SPLITS == 1:
        tl.store(out + head[:, None] * D + dim[None, :], (mixed / total[:, None]).to(out.dtype.element_ty), mask=inside)
    else:
        at = head * SPLITS + split
        tl.store(bests + at, best, mask=row < REPEAT)
        tl.store(totals + at, total, mask=row < REPEAT)
        tl.store(parts + at[:, None] * D + dim[None, :], mixed, mask=inside)


@triton.jit
def combine_splits(
    bests, totals, parts, out, SPLITS: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One head's output [D] of all its splits; what an empty one holds has the weight zero."""
    release(PDL)
    head, split, dim = tl.program_id(0), tl.arange(0, PADDED), tl.arange(0, DIM)
    at = head * SPLITS + split
    inside = (split < SPLITS)[:, None] & (dim < D)[None, :]
    wait(PDL)
    best = tl.load(bests + at, mask=split < SPLITS, other=LEAST)
    total = tl.load(totals + at, mask=split < SPLITS, other=0.0)
    mixed = tl.load(parts + at[:, None] * D + dim[None, :], mask=inside, other=0.0)
    share = tl.exp2(best - tl.max(best, 0))
    value = tl.sum(mixed * share[:, None], 0) / tl.sum(total * share, 0)
    tl.store(out + head * D + dim, value.to(out.dtype.element_ty), mask=dim < D)


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
    *,
    pdl: bool,
) -> Tensor:
    """As ``stepping.attend``; weights of several queries a key are rounded to the cache's type."""
    assert all(t.is_contiguous() for t in (keys_BGSD, values_BGSD)), "written in place as they lie"
    (batch, heads, size), groups, slots = q_BHD.shape, keys_BGSD.shape[1], keys_BGSD.shape[2]
    tile = _tile(batch * groups, slots, q_BHD.device)
    splits = _splits(batch * groups, slots, tile, q_BHD.device)
    out = q_BHD.new_empty(batch, heads * size)
    bests, totals = (_partial(out, splits, batch * heads) for _ in range(2))
    parts = _partial(out, splits, batch * heads, size)
    q, k, v = (None if t is None else t.contiguous() for t in (q_BHD, k_BGD, v_BGD))
    angles = (None, None, 0, 0) if rotary is None else (*rotary, *(t.stride(0) for t in rotary))
    assert rotary is None or all(t.stride(1) == 1 for t in rotary), "a row's angles lie beside each other"
    shape = {"D": size, "DIM": max(DOT, triton.next_power_of_2(size)), "SPLITS": splits}
    layout = {"GROUPS": groups, "REPEAT": heads // groups, "R": 0 if rotary is None else rotary[0].shape[-1]}
    layout["M"] = max(DOT, triton.next_power_of_2(heads // groups))
    launch = {"PDL": pdl, "launch_pdl": pdl}
    attend_splits[(batch * groups, splits)](
        q, k, v, *angles, keys_BGSD, values_BGSD, position, first_B, out, bests, totals, parts, slots, scale, softcap,
        WINDOW=window, SLOTS=tile.slots, STAGES=tile.stages, num_warps=tile.warps, **shape, **layout, **launch,
    )  # fmt: skip
    if splits > 1:
        padded = triton.next_power_of_2(splits)
        combine_splits[(batch * heads,)](bests, totals, parts, out, PADDED=padded, **shape, **launch)
    return out


def _partial(like: Tensor, splits: int, *shape: int) -> Tensor | None:
    """Room for what the splits found, none if there is one."""
    return None if splits == 1 else torch.empty(*shape[:1], splits, *shape[1:], dtype=torch.float32, device=like.device)


def _tile(heads: int, slots: int, device: torch.device) -> Tile:
    """For so many key-value heads of all rows over so many slots."""
    if heads >= _multiprocessors(device):
        return MANY
    return SHORT if heads <= SHORT_HEADS and slots <= SHORT_SLOTS else FEW


def _splits(programs: int, slots: int, tile: Tile, device: torch.device) -> int:
    """As many as fill the device once, of at least one tile each."""
    fill = _multiprocessors(device) * tile.resident // programs
    return max(1, min(fill, MAX_SPLITS, triton.cdiv(slots, tile.slots)))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
