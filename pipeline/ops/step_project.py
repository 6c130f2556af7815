"""``project`` of a decoding step in Triton: the norm and all products of it, at the speed of the weights' bytes.

One sequence: each program multiplies ``n`` rows of a weight with the whole input in float32 and recomputes the input's
norm, which costs less than a kernel of its own. Several: tensor cores, and the norm before. Parts are separate pointers
in one launch: nothing is copied.
"""

from collections.abc import Sequence
from dataclasses import replace
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
    begin_of,
    biased,
    biased_part,
    block_starts,
    dot_rows,
    filled,
    first_tiles,
    launch_options,
    next_tiles,
    number_of_part,
    of_part,
    padded_rows,
)
from pipeline.ops.step_reduce import chunk_sums, reduce
from pipeline.ops.stepping import LayerNorm, Norm, Projection, RmsNorm, Term

# The best of a dozen each on an H200, at Phi-2's sizes, in chains of layers. One sequence: a program asks for two tiles
# before it waits, which are all that it needs of 2,560 inputs; a warp has whole rows, and nothing is exchanged.
PROJECT_ROW = Tile(n=8, k=2048, warps=4)
PROJECT_ROWS = Tile(n=64, k=128, warps=4, stages=3)
PROJECT_MANY = Tile(n=128, k=64, warps=8, stages=3)
NORM_WARPS = 16


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
        value = biased(value, bias, at, K)
    return value


@triton.jit
def _acted(y, gated, block, STARTS: tl.constexpr, ACTIVATIONS: tl.constexpr):
    """``act(y)``, or ``act(gated) · y`` where there is that, by the program's part."""
    base = y if gated is None else gated
    value = base
    for i in tl.static_range(len(ACTIVATIONS)):
        if ACTIVATIONS[i] is not None:
            here = (block >= STARTS[i]) & (block < STARTS[i + 1])
            value = tl.where(here, activated(base, tl.constexpr(ACTIVATIONS[i])), value)
    return value if gated is None else value * y


@triton.jit
def project_row(
    x, norm_weight, norm_bias, eps, weights, biases, gates, gate_biases, outs,
    SIZES: tl.constexpr, STARTS: tl.constexpr, BIASED: tl.constexpr, GATE_BIASED: tl.constexpr,
    ACTIVATIONS: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDTHS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """All parts of one row; programs from ``STARTS[i]`` on belong to part i."""
    block = tl.program_id(0)
    weight, size = of_part(weights, block, STARTS), number_of_part(SIZES, block, STARTS)
    row = (block - number_of_part(STARTS, block, STARTS)) * BLOCK_N + tl.arange(0, BLOCK_N)
    tiles = first_tiles(weight, row, size, K, WIDTHS)
    y, gated = tl.zeros([BLOCK_N], tl.float32), None
    if gates is not None:
        gate, gated = of_part(gates, block, STARTS), y
        gate_tiles = first_tiles(gate, row, size, K, WIDTHS)
    wait(PDL)
    mean, scale = 0.0, 1.0
    if NORM is not None:
        mean, scale = _moments(x, eps, K, NORM, WHOLE)
    for i in tl.static_range(len(WIDTHS)):
        at = begin_of(WIDTHS, i) + tl.arange(0, WIDTHS[i])
        value = _normed(x, norm_weight, norm_bias, mean, scale, at, K, NORM)[None, :]
        tiles = next_tiles(tiles, weight, row, size, K, WIDTHS, i)
        y += tl.sum(tiles[i].to(tl.float32) * value, 1)
        if gates is not None:
            gate_tiles = next_tiles(gate_tiles, gate, row, size, K, WIDTHS, i)
            gated += tl.sum(gate_tiles[i].to(tl.float32) * value, 1)
    release(PDL)  # as late as where there are several rows
    y = biased_part(y, biases, block, row, size, STARTS, BIASED)
    if gates is not None:
        gated = biased_part(gated, gate_biases, block, row, size, STARTS, GATE_BIASED)
    out = of_part(outs, block, STARTS)
    y = _acted(y, gated, block, STARTS, ACTIVATIONS)
    tl.store(out + row, y.to(out.dtype.element_ty), mask=row < size)


@triton.jit
def add_and_normalise(
    residual, sums, biases, added, weight, bias, eps, out, B,
    K: tl.constexpr, TERMS: tl.constexpr, CHUNKS: tl.constexpr, NORM: tl.constexpr, WHOLE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One row [K] a program: the residual, the biases and the chunks' sums, in this order; and the norm of it all."""
    release(PDL)
    row, at = tl.program_id(0), tl.arange(0, WHOLE)
    inside = at < K
    wait(PDL)
    value = tl.load(residual + row * K + at, mask=inside, other=0.0).to(tl.float32)
    for j in tl.static_range(TERMS):
        value = biased(value, biases[j], at, K)
    for chunk in tl.static_range(CHUNKS):
        value += tl.load(sums + (chunk * B + row) * K + at, mask=inside, other=0.0)
    if added is not None:
        # rounded as it is passed on
        value = value.to(added.dtype.element_ty)
        tl.store(added + row * K + at, value, mask=inside)
        value = value.to(tl.float32)
    if NORM is not None:
        mean = tl.sum(value, 0) / K if NORM == "layer" else 0.0
        value = tl.where(inside, value - mean, 0.0)
        value *= 1.0 / tl.sqrt(tl.sum(value * value, 0) / K + eps)
        value *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        value = biased(value, bias, at, K)
        tl.store(out + row * K + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def project_rows(
    x, weights, biases, gates, gate_biases, outs, B,
    SIZES: tl.constexpr, STARTS: tl.constexpr, BIASED: tl.constexpr, GATE_BIASED: tl.constexpr,
    ACTIVATIONS: tl.constexpr, K: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """All parts of B rows that are normed already; programs from ``STARTS[i]`` on belong to part i."""
    block, batch = tl.program_id(0), tl.arange(0, M)
    size = number_of_part(SIZES, block, STARTS)
    row = (block - number_of_part(STARTS, block, STARTS)) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = dot_rows(x, of_part(weights, block, STARTS), row, 0, K, B, size, K, M, BLOCK_N, BLOCK_K, STAGES, PDL)
    release(PDL)  # not before: attention's programs would crowd where these are few, and stay there
    y = biased_part(y, biases, block, row, size, STARTS, BIASED)
    gated = None
    if gates is not None:
        gated = dot_rows(x, of_part(gates, block, STARTS), row, 0, K, B, size, K, M, BLOCK_N, BLOCK_K, STAGES, False)
        gated = biased_part(gated, gate_biases, block, row, size, STARTS, GATE_BIASED)
    y = _acted(y, gated, block, STARTS, ACTIVATIONS)
    out, inside = of_part(outs, block, STARTS), (batch < B)[:, None] & (row < size)[None, :]
    tl.store(out + batch[:, None] * size + row[None, :], y.to(out.dtype.element_ty), mask=inside)


def project(x_BK: Tensor, norm: Norm | None, parts: Sequence[Projection], pdl: bool) -> list[Tensor]:
    """As ``stepping.project``; several rows round the normed input to their type, beyond ``ROWS`` torch computes."""
    if len(x_BK) > ROWS:
        return _torch_project(x_BK, norm, parts)
    x_BK = x_BK.contiguous()
    if len(x_BK) > 1 and norm is not None:
        _, x_BK = _added_and_normed(x_BK, (), norm, pdl)
    return _products(x_BK, norm, parts, pdl)


def advance(
    residual_BN: Tensor, terms: Sequence[Term], norm: Norm | None, parts: Sequence[Projection], pdl: bool
) -> tuple[Tensor, list[Tensor]]:
    """As ``stepping.advance``; of several rows one kernel adds up the chunks' sums and makes the norm."""
    if not 1 < len(residual_BN) <= ROWS:
        added = reduce(residual_BN, terms, pdl)
        return added, project(added, norm, parts, pdl) if parts else []
    added, normed = _added_and_normed(residual_BN.contiguous(), terms, norm, pdl)
    return added, _products(normed, None, parts, pdl) if parts else []


def _products(x_BK: Tensor, norm: Norm | None, parts: Sequence[Projection], pdl: bool) -> list[Tensor]:
    """Each part of up to ``ROWS`` rows; several are normed already."""
    if len({p.gate is None for p in parts}) > 1:  # a launch has gates or has none
        return [out for part in parts for out in _products(x_BK, norm, [part], pdl)]
    rows, size = x_BK.shape
    tile = PROJECT_ROW if rows == 1 else PROJECT_ROWS if rows <= TENSOR_ROWS else PROJECT_MANY
    if rows == 1 and parts[0].gate is not None:
        tile = replace(tile, n=tile.n // 2)  # of each of two weights
    sizes = tuple(len(p.weight) for p in parts)
    starts = block_starts(sizes, tile.n)
    biases, given = filled([p.bias for p in parts])
    gate_biases, gate_given = filled([p.gate_bias for p in parts])
    gates = None if parts[0].gate is None else tuple(p.gate for p in parts)
    outs = tuple(x_BK.new_empty(rows, n) for n in sizes)
    columns = (tuple(p.weight for p in parts), biases, gates, gate_biases, outs)
    launch: dict[str, Any] = {
        "SIZES": sizes,
        "STARTS": starts,
        "BIASED": given,
        "GATE_BIASED": gate_given,
        "ACTIVATIONS": tuple(p.activation for p in parts),
        "K": size,
        "BLOCK_N": tile.n,
        **launch_options(tile.warps, pdl),
    }
    if rows == 1:
        weight, bias, eps, kind = _norm_arguments(norm)
        shape = {"NORM": kind, "WHOLE": triton.next_power_of_2(size), "WIDTHS": tile.widths(size, x_BK)}
        project_row[(starts[-1],)](x_BK, weight, bias, eps, *columns, **shape, **launch)
    else:
        tiles = {"M": padded_rows(rows), "BLOCK_K": tile.columns(x_BK), "STAGES": tile.stages}
        project_rows[(starts[-1],)](x_BK, *columns, rows, **tiles, **launch)
    return list(outs)


def _added_and_normed(
    residual_BK: Tensor, terms: Sequence[Term], norm: Norm | None, pdl: bool
) -> tuple[Tensor, Tensor]:
    """The residual and all terms added up, and the norm of that; of what there is none of, the same tensor."""
    rows, size = residual_BK.shape
    weight, bias, eps, kind = _norm_arguments(norm)
    sums = chunk_sums(terms, pdl) if terms else None
    added = torch.empty_like(residual_BK) if terms else None
    out = torch.empty_like(residual_BK) if norm else None
    shape = {"K": size, "NORM": kind, "WHOLE": triton.next_power_of_2(size), "TERMS": len(terms)}
    shape["CHUNKS"] = 0 if sums is None else len(sums)
    biases = tuple(t.bias for t in terms)
    add_and_normalise[(rows,)](
        residual_BK, sums, biases, added, weight, bias, eps, out, rows, **shape, **launch_options(NORM_WARPS, pdl)
    )
    added = residual_BK if added is None else added
    return added, added if out is None else out


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
