"""What every cached row is, from a few small columns: what training may use it for, and how long it is."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np

from pipeline.shards import read_manifest, read_shard
from pipeline.store import Store
from pipeline.taps import is_tapped, place_of
from pipeline.training.order import batch_items
from pipeline.training.sources import Source
from schemas.artifacts import ArtifactRef
from schemas.errors import ConfigInvalid, ShardCorrupt
from schemas.tables import SAMPLES

# Shards' small columns are read so many at once: on object storage each read is mostly waiting.
READS = 16
# A place in a cache: which rows a phase goes over.
Use = Literal["all", "tapped", "held_out"]


def is_held_out(sample_id: str, fraction: float) -> bool:
    """Whether a sample is kept for validation: the same for every student of a cache."""
    return place_of(f"held-out:{sample_id}") < fraction * 2**64


class CacheIndex:
    """By shard: token counts, positions with a target, supervised tokens, and which rows each use goes over."""

    def __init__(self, store: Store, samples: ArtifactRef, sources: Sequence[Source], held_out: float = 0.0) -> None:
        self.samples = read_manifest(store, samples)
        self.targets = [read_manifest(store, source.ref) for source in sources]
        for source, manifest in zip(sources, self.targets, strict=True):
            if self.samples.shard_rows != manifest.shard_rows:
                raise ShardCorrupt(f"{source.ref}: its shards do not have the rows of {samples}'s")

        def read(shard: int) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
            names = ["sample_id", "tokens", "response_tokens"]
            data = read_shard(store, samples, SAMPLES, self.samples.shards[shard], names)
            return (
                data["sample_id"].to_pylist(),
                data["tokens"].to_numpy(),
                self._positions(store, sources, shard),
                data["response_tokens"].to_numpy(),
            )

        with ThreadPoolExecutor(READS) as pool:
            found = list(pool.map(read, range(len(self.samples.shards))))
        cache = sources[0].cache
        self.ids, self.tokens, self.positions, self.supervised = (list(column) for column in zip(*found, strict=True))
        self.tapped = [np.array([is_tapped(i, cache.taps.fraction, cache.seed) for i in ids], bool) for ids in self.ids]
        held = [np.array([is_held_out(i, held_out) for i in ids], bool) for ids in self.ids]
        self.rows: dict[Use, list[np.ndarray]] = {
            "all": [np.flatnonzero(~h) for h in held],
            "tapped": [np.flatnonzero(t & ~h) for t, h in zip(self.tapped, held, strict=True)],
            "held_out": [np.flatnonzero(h) for h in held],
        }

    def _positions(self, store: Store, sources: Sequence[Source], shard: int) -> np.ndarray:
        """How many positions with a target each row has, the same in every source."""
        own, *others = (
            read_shard(store, source.ref, source.table, manifest.shards[shard], ["positions"])["positions"]
            for source, manifest in zip(sources, self.targets, strict=True)
        )
        for source, positions in zip(sources[1:], others, strict=True):
            if positions != own:
                where = store.path(f"{source.ref}/{self.samples.shards[shard].name}")
                raise ShardCorrupt(f"{where}: its rows do not have as many positions as {sources[0].ref}'s")
        return np.asarray(own)

    def count(self, use: Use) -> int:
        """How many rows there are for a use.

        Raises:
            ConfigInvalid: none.
        """
        found = sum(len(rows) for rows in self.rows[use])
        if not found:
            raise ConfigInvalid(
                {
                    "all": f"distill.validation.fraction: leaves none of {self.samples.rows} samples to train on",
                    "tapped": f"cache.taps.fraction: none of {self.samples.rows} samples is tapped, but the recipe "
                    "needs taps; cache with a larger fraction",
                    "held_out": f"distill.validation.fraction: holds out none of {self.samples.rows} samples",
                }[use]
            )
        return found

    def step_items(self, use: Use, batch: int, seed: int, step: int) -> np.ndarray:
        """int64[batch, 2] of (shard, row): the global batch of a step."""
        rows = self.rows[use]
        items = batch_items(seed, step, batch, [len(r) for r in rows])
        return np.array([[shard, rows[shard][row]] for shard, row in items])

    def first(self, use: Use, count: int) -> np.ndarray:
        """int64[at most count, 2]: the first rows of a use, in the cache's order."""
        places = ((shard, row) for shard, rows in enumerate(self.rows[use]) for row in rows)
        return np.array([place for place, _ in zip(places, range(count), strict=False)], np.int64).reshape(-1, 2)

    def of(self, values: list[np.ndarray], items: np.ndarray) -> np.ndarray:
        """A per-row value of each item."""
        return np.array([values[shard][row] for shard, row in items])
