"""Histograms of an artifact's columns: exact counts of every value, gathered shard by shard, in bins with round edges.

What is counted has few distinct values (whole numbers, or float16 with 65,536), so memory does not grow with the rows.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.shards import read_shard
from pipeline.store import Store
from schemas.artifacts import ArtifactRef
from schemas.errors import ShardCorrupt
from schemas.manifest import ShardInfo
from schemas.tables import Table

# Bins of one histogram: what fits on half a terminal's height.
BINS = 12


@dataclass(frozen=True)
class Measure:
    """What is counted: a column, and the type of its values where they are packed into bytes."""

    title: str
    column: str
    packed: str | None = None


MEASURES = {
    "samples": (
        Measure("tokens a sample", "tokens"),
        Measure("response tokens a sample", "response_tokens"),
    ),
    "targets": (
        Measure("positions with a target a sample", "positions"),
        Measure("distinct ids a position", "n_unique", "u1"),
        Measure("entropy a position, nats", "entropy", "<f2"),
        Measure("log-probability of the token that follows", "gold_logprob", "<f2"),
    ),
}


@dataclass(frozen=True)
class Histogram:
    """Counts of values in ``[edges[i], edges[i + 1])``; the last bin has its upper edge.

    ``whole`` numbers stand in bins of whole numbers: the upper edge itself then belongs to no value.
    """

    title: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    median: float
    largest: float
    smallest: float
    whole: bool

    @property
    def total(self) -> int:
        """Values counted."""
        return sum(self.counts)


def histograms(store: Store, ref: ArtifactRef, table: Table, shards: Sequence[ShardInfo]) -> list[Histogram]:
    """The histograms of a table's artifact over some of its shards, of which only the counted columns are read."""
    present = {c.name for c in table.columns}
    measures = [m for m in MEASURES[table.name] if m.column in present]
    tallies: list[Counter[float]] = [Counter() for _ in measures]
    for info in shards:
        data = read_shard(store, ref, table, info, [m.column for m in measures])
        for measure, tally in zip(measures, tallies, strict=True):
            values, counts = np.unique(_values(data, measure), return_counts=True)
            if not np.isfinite(values).all():
                where = store.path(f"{ref}/{info.name}")
                raise ShardCorrupt(f"{where}: column {measure.column} has values that are no numbers")
            tally.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    return [histogram(m.title, t, whole=m.packed != "<f2") for m, t in zip(measures, tallies, strict=True)]


def _values(data: pa.Table, measure: Measure) -> np.ndarray:
    column = data[measure.column]
    if measure.packed is None:
        return column.to_numpy()
    return np.frombuffer(b"".join(column.to_pylist()), measure.packed)


def histogram(title: str, tally: Counter[float], *, whole: bool) -> Histogram:
    """At most ``BINS`` bins and one of equal, round width over the tally's values."""
    values = np.array(sorted(tally))
    counts = np.array([tally[v] for v in values])
    step = _round_step((values[-1] - values[0]) / BINS, whole=whole)
    first = math.floor(values[0] / step)
    # where the last value is an edge of its bin, only whole numbers begin another one
    last = math.floor(values[-1] / step) if whole else max(math.ceil(values[-1] / step) - 1, first)
    bins = np.clip(np.floor(values / step).astype(int), first, last) - first
    return Histogram(
        title,
        tuple(round(i * step, 12) for i in range(first, last + 2)),
        tuple(int(n) for n in np.bincount(bins, counts, last - first + 1)),
        float(values[np.searchsorted(np.cumsum(counts), counts.sum() / 2)]),
        float(values[-1]),
        float(values[0]),
        whole,
    )


def _round_step(least: float, *, whole: bool) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below ``least``."""
    if least <= (1 if whole else 0):
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
