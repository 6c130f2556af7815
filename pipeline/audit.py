"""Compares rows of a cache with what the teacher gives for them now: how far apart, and how far they may be.

A second pass never repeats the first bit for bit: other batches and other hardware add the same numbers up in another
order. What that moves is bounded here, field by field; what lies beyond was computed from something else.

Shapes: P positions, K kept, D hidden size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.activations import decode_activation
from pipeline.taps import place_of
from schemas.config import CacheConfig
from schemas.sections import ActivationType, Dtype
from schemas.tables import VISION

# How far a logit may be off, as a share of its size. float32 has 24 bits, and passes in other batches differ by 1e-6;
# but a GPU may convolve in TensorFloat-32 (2^-11) in the vision tower: twice that. bfloat16 has 8 bits, and the
# roundings of all layers (2^-9 each) add up: the demo teacher's eight leave a quarter of this between two batches.
LOGIT: dict[Dtype, float] = {"float32": 2.0**-10, "bfloat16": 2.0**-5}
# The least size of a position's largest logits, of which log-sum-exp tells the size but where it is near 0.
LOGIT_SIZE = 10.0
# Both passes round to float16: half a unit in the last place of eleven bits each.
FLOAT16 = 2.0**-10
# A unit in the last place of a stored activation, as a share of the value.
UNIT: dict[ActivationType, float] = {"bfloat16": 2.0**-7, "fp8_e4m3": 2.0**-3}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """One field of one row: ``error`` and ``tolerance`` where their ratio is largest, ``equal`` the share unchanged.

    ``expected`` is what the teacher gives there now, ``got`` what the cache holds.
    """

    field: str
    equal: float
    error: float
    tolerance: float
    expected: str
    got: str

    @property
    def beyond(self) -> bool:
        """Whether rounding does not explain it; what is no number is beyond."""
        return not self.error <= self.tolerance


def chosen_rows(sample_ids: Sequence[str], fraction: float, seed: int) -> list[int]:
    """Indices of the rows to audit; a row's choice depends on its sample and the seed alone, one at least is chosen."""
    places = [place_of(f"audit:{seed}:{name}") for name in sample_ids]
    found = [i for i, place in enumerate(places) if place < fraction * 2**64]
    return found or [places.index(min(places))]


def compare(config: CacheConfig, tokens: int, cached: Row, fresh: Row) -> list[Difference]:
    """A cached row of a sample of ``tokens`` tokens against the teacher's fresh one, field by field."""
    found = _unlike(config, cached, fresh)
    if found:
        return found
    relative, targets = LOGIT[config.dtype], config.targets
    bound_P = relative * np.maximum(np.abs(_values(fresh, "lse", "<f4")), LOGIT_SIZE)
    cooled_P = bound_P / targets.temperature
    for name, dtype, bound in (("lse", "<f4", bound_P), ("gold_logprob", "<f2", bound_P), ("entropy", "<f2", cooled_P)):
        found.append(_numbers(name, _values(cached, name, dtype), _values(fresh, name, dtype), bound))
    if targets.kind == "sampled":
        found.append(_draws(targets.draws, cooled_P, cached, fresh))
    elif targets.kind == "top_k":
        found.append(_top(cooled_P, cached, fresh))
    else:
        found.append(_activation("hidden", int(fresh["positions"]), targets.dtype, relative, cached, fresh))
    taps = [n for n in fresh if n.startswith("tap_") and not n.endswith("_scale") and fresh[n] is not None]
    found += [_activation(name, tokens, config.taps.dtype, relative, cached, fresh) for name in taps]
    if fresh.get("patches"):
        found.append(_activation(VISION, int(fresh["patches"]), "bfloat16", relative, cached, fresh))
    return found


def _unlike(config: CacheConfig, cached: Row, fresh: Row) -> list[Difference]:
    """Fields that are there in one and not in the other, or hold another number of values."""
    counts = [n for n in ("positions", "patches") if cached.get(n) != fresh.get(n)]
    if counts:
        return [_off(name, str(fresh[name]), str(cached[name])) for name in counts]
    free = ("ids", "counts") if config.targets.kind == "sampled" else ()
    sizes = {n: (_bytes(fresh[n]), _bytes(cached[n])) for n in fresh if n not in ("positions", "patches", *free)}
    found = [_off(name, a, b) for name, (a, b) in sizes.items() if a != b]
    if free and not found:
        unique = int(_values(cached, "n_unique", "u1").sum())
        for name, dtype in (("ids", cached["ids_dtype"]), ("counts", "u1")):
            wanted = unique * np.dtype(dtype).itemsize
            if pa.py_buffer(cached[name]).size != wanted:
                found.append(_off(name, f"{wanted} bytes", _bytes(cached[name])))
    return found


def _bytes(value: Any) -> str:
    if value is None or isinstance(value, str):
        return str(value or "empty")
    return f"{pa.py_buffer(value).size} bytes"


def _off(field: str, expected: str, got: str) -> Difference:
    return Difference(field, 0.0, math.inf, 0.0, expected, got)


def _values(row: Row, name: str, dtype: str) -> np.ndarray:
    return np.frombuffer(row[name], dtype)


def _worst(error: np.ndarray, tolerance: np.ndarray) -> int:
    """Where the error is largest for its tolerance; what is no number is infinite."""
    return int(np.argmax(np.nan_to_num(error / tolerance, nan=np.inf)))


def _numbers(field: str, got_P: np.ndarray, expected_P: np.ndarray, bound_P: np.ndarray) -> Difference:
    """Values that follow from logits, which may be off by ``bound_P``."""
    rounding = FLOAT16 * np.abs(expected_P) if expected_P.dtype.itemsize == 2 else 0.0
    error, tolerance = np.abs(got_P.astype(np.float64) - expected_P), bound_P + rounding
    worst = _worst(error, tolerance)
    return Difference(
        field,
        float((got_P == expected_P).mean()),
        float(error[worst]),
        float(tolerance[worst]),
        f"{expected_P[worst]:.6g} at position {worst}",
        f"{got_P[worst]:.6g}",
    )


def _draws(draws: int, bound_P: np.ndarray, cached: Row, fresh: Row) -> Difference:
    """How many draws lie on the other side of some id, as a share of all.

    The same uniform numbers invert two cumulative distributions, so a draw that lands on a neighbour of its id crosses
    one border, whatever the two ids mean. Logits off by x move at most x / 2 of the probability; and one draw may have
    been on a border.
    """
    positions = len(bound_P)
    (mine, my_counts), (theirs, their_counts) = (_keyed_draws(row, positions) for row in (cached, fresh))
    distinct, where = np.unique(np.concatenate([mine, theirs]), return_inverse=True)
    more = np.bincount(where, np.concatenate([my_counts, -their_counts]))
    crossed, changed = np.zeros(positions), np.zeros(positions, bool)
    np.maximum.at(crossed, distinct >> 32, np.abs(np.cumsum(more)))
    np.logical_or.at(changed, distinct >> 32, more != 0)
    worst, total = int(np.argmax(crossed)), positions * draws
    return Difference(
        "ids, counts",
        float(1 - changed.mean()),
        float(crossed.sum()) / total,
        float(bound_P.mean()) / 2 + 1 / total,
        f"{_shown(theirs, their_counts, worst)} at position {worst}",
        _shown(mine, my_counts, worst),
    )


def _keyed_draws(row: Row, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """(position, id) as one int64, ascending, and how often each was drawn."""
    place = np.repeat(np.arange(positions), _values(row, "n_unique", "u1"))
    ids = _values(row, "ids", row["ids_dtype"]).astype(np.int64)
    return (place << 32) | ids, _values(row, "counts", "u1").astype(np.float64)


def _shown(keys: np.ndarray, counts: np.ndarray, position: int) -> str:
    """A position's draws in words, the most frequent first."""
    inside = np.flatnonzero(keys >> 32 == position)
    inside = inside[np.argsort(-counts[inside], kind="stable")]
    pairs = [f"{keys[i] & 0xFFFFFFFF} ×{counts[i]:.0f}" for i in inside[:3]]
    return ", ".join(pairs) + (", …" if len(inside) > 3 else "")


def _top(bound_P: np.ndarray, cached: Row, fresh: Row) -> Difference:
    """Log-probabilities of the ids kept; ``equal`` is the share of ids that both keep.

    An id that only one keeps is, in the other, at most as probable as the least probable there.
    """
    shape = (len(bound_P), -1)
    keys, logs = [], []
    for row in (cached, fresh):
        ids_PK = _values(row, "ids", row["ids_dtype"]).astype(np.int64).reshape(shape)
        keys.append((np.arange(len(bound_P))[:, None] << 32) | ids_PK)
        logs.append(_values(row, "logprobs", "<f2").astype(np.float64).reshape(shape))
    own = np.stack(logs)  # [2, P, K]: the cache's, the teacher's
    other = np.minimum(own, own[::-1].min(-1, keepdims=True))
    _, mine, theirs = np.intersect1d(keys[0], keys[1], return_indices=True)
    other[0].flat[mine], other[1].flat[theirs] = logs[1].flat[theirs], logs[0].flat[mine]
    error, tolerance = np.abs(own - other), bound_P[:, None] + FLOAT16 * np.abs(own)
    at = np.unravel_index(_worst(error, tolerance), error.shape)
    expected, got = (own[at], other[at]) if at[0] else (other[at], own[at])
    return Difference(
        "ids, logprobs",
        len(mine) / logs[0].size,
        float(error[at]),
        float(tolerance[at]),
        f"{expected:.4g} for id {keys[at[0]][at[1:]] & 0xFFFFFFFF} at position {at[1]}",
        f"{got:.4g}",
    )


def _activation(field: str, tokens: int, dtype: ActivationType, relative: float, cached: Row, fresh: Row) -> Difference:
    """Activations [tokens, D] as a share of their norm.

    Values off by r, stored in steps of u, end r / u of the time a step of u apart: sqrt(r u) in the mean square.
    """
    got, expected = (decode_activation(field, row, tokens, dtype).wide() for row in (cached, fresh))
    norm = torch.linalg.norm(expected)
    error = torch.linalg.norm(got - expected) / norm.clamp_min(torch.finfo(torch.float32).tiny)
    return Difference(
        field,
        float((got == expected).float().mean()),
        float(error),
        relative + math.sqrt(relative * UNIT[dtype]),
        f"a norm of {float(norm):.6g}",
        f"one of {float(torch.linalg.norm(got)):.6g}",
    )
