"""The shards that training has in memory: read once for all threads that need them, in the background and bounded."""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from threading import Lock

import numpy as np
import pyarrow as pa

from pipeline.shards import Row, read_shard, rows_of
from pipeline.store import Store
from pipeline.training.index import CacheIndex
from pipeline.training.order import WINDOW
from pipeline.training.sources import Source
from schemas.artifacts import ArtifactRef
from schemas.errors import ShardCorrupt
from schemas.tables import SAMPLES, tap_columns, targets_table

# Columns of the targets that no loss reads.
UNREAD = ("lse", "gold_logprob")
# Decoded shards kept in memory; a small cache is then read once, a large one window by window.
MEMORY_BYTES = 2 * 2**30
# What of a shard is read: the samples, the targets of a source (its number), or the taps of some layers.
Part = tuple[str, tuple[int, ...]]


class ShardWindow:
    """Rows of shards, by part; safe to be used by several threads."""

    def __init__(
        self,
        store: Store,
        samples: ArtifactRef,
        sources: Sequence[Source],
        index: CacheIndex,
        vocabulary: int,
    ) -> None:
        """``vocabulary`` is the student's: no token of any source may be beyond it."""
        self.store, self.samples, self.sources, self.index = store, samples, sources, index
        self.cache, self.vocabulary = sources[0].cache, vocabulary
        # at least two windows of each part
        self.least = 2 * WINDOW * (2 + len(sources))
        self._shards: OrderedDict[tuple[Part, int], Future[tuple[list[Row], int]]] = OrderedDict()
        self._lock, self._held = Lock(), 0

    def rows(self, part: Part, shard: int) -> list[Row]:
        """Rows of one shard, of the samples, a source's targets or some layers' taps; the latest used stay in memory.

        At least two windows of shards stay, the one in use and the next, or every step would read them anew.
        """
        key = (part, shard)
        with self._lock:
            future = self._shards.get(key)
            mine = future is None
            if future is None:
                future = self._shards[key] = Future()
            self._shards.move_to_end(key)
        if mine:
            self._fill(key, future)
        return future.result()[0]

    def _fill(self, key: tuple[Part, int], future: Future[tuple[list[Row], int]]) -> None:
        """Reads a shard for all who wait for it."""
        try:
            data = self._read(*key)
        except BaseException as error:
            with self._lock:
                del self._shards[key]
            future.set_exception(error)
            return
        future.set_result((rows_of(data), data.nbytes))
        with self._lock:
            self._held += data.nbytes
            while self._held > MEMORY_BYTES and len(self._shards) > self.least:
                oldest = next((k for k, f in self._shards.items() if f.done()), None)
                if oldest is None:
                    break
                self._held -= self._shards.pop(oldest).result()[1]

    def _read(self, part: Part, shard: int) -> pa.Table:
        kind, numbers = part
        if kind == "samples":
            pixels = ["images", "image_bytes"] if self.cache.vision == "none" else []
            columns = ["sample_id", "input_ids", "spans", *pixels]
            return read_shard(self.store, self.samples, SAMPLES, self.index.samples.shards[shard], columns)
        if kind == "targets":
            return self._targets(numbers[0], shard)
        columns = [c.name for layer in numbers for c in tap_columns(layer, self.cache.taps)]
        own, info = self.sources[0], self.index.targets[0].shards[shard]
        return read_shard(self.store, own.ref, own.table, info, columns)

    def _targets(self, number: int, shard: int) -> pa.Table:
        """What losses read of a source's targets; features of the run's own alone."""
        source, info = self.sources[number], self.index.targets[number].shards[shard]
        cache = source.cache if number == 0 else source.cache.model_copy(update={"vision": "none"})
        columns = [c.name for c in targets_table(cache, ()).columns if c.name not in UNREAD]
        data = read_shard(self.store, source.ref, source.table, info, columns)
        for row in rows_of(data) if "ids" in columns else ():
            largest = int(np.frombuffer(row["ids"], row["ids_dtype"]).max(initial=0))
            if largest >= self.vocabulary:
                raise ShardCorrupt(
                    f"{self.store.path(f'{source.ref}/{info.name}')}: {row['sample_id']} has token {largest}, but the "
                    f"student's vocabulary ends at {self.vocabulary - 1}: the cache is damaged, or of a "
                    "teacher with a larger vocabulary, whose targets this student cannot learn (distill.teachers)"
                )
        return data
