"""The shards that training has in memory: read once for all threads that need them, in the background and bounded."""

from collections import OrderedDict
from concurrent.futures import Future
from threading import Lock

import pyarrow as pa

from pipeline.shards import Row, read_shard, rows_of
from pipeline.store import Store
from pipeline.training.index import CacheIndex
from pipeline.training.order import WINDOW
from schemas.artifacts import ArtifactRef
from schemas.config import CacheConfig
from schemas.tables import SAMPLES, Table, tap_columns, targets_table

# Columns of the targets that no loss reads.
UNREAD = ("lse", "gold_logprob")
# Decoded shards kept in memory; a small cache is then read once, a large one window by window.
MEMORY_BYTES = 2 * 2**30
# What of a shard is read: the samples, the targets, or the taps of some layers.
Part = tuple[str, tuple[int, ...]]
KINDS = 3


class ShardWindow:
    """Rows of shards, by part; safe to be used by several threads."""

    def __init__(
        self,
        store: Store,
        samples: ArtifactRef,
        targets: ArtifactRef,
        cache: CacheConfig,
        table: Table,
        index: CacheIndex,
    ) -> None:
        self.store, self.samples, self.targets, self.cache = store, samples, targets, cache
        self.table, self.index = table, index
        self.target_names = [c.name for c in targets_table(cache, ()).columns if c.name not in UNREAD]
        self._shards: OrderedDict[tuple[Part, int], Future[tuple[list[Row], int]]] = OrderedDict()
        self._lock, self._held = Lock(), 0

    def rows(self, part: Part, shard: int) -> list[Row]:
        """Rows of one shard, of the samples, the targets or some layers' taps; the latest used stay in memory.

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
            while self._held > MEMORY_BYTES and len(self._shards) > KINDS * 2 * WINDOW:
                oldest = next((k for k, f in self._shards.items() if f.done()), None)
                if oldest is None:
                    break
                self._held -= self._shards.pop(oldest).result()[1]

    def _read(self, part: Part, shard: int) -> pa.Table:
        kind, layers = part
        if kind == "samples":
            columns = ["sample_id", "input_ids", "spans", *(["image"] if self.cache.vision == "none" else [])]
            return read_shard(self.store, self.samples, SAMPLES, self.index.samples.shards[shard], columns)
        columns = self.target_names
        if kind == "taps":
            columns = [c.name for layer in layers for c in tap_columns(layer, self.cache.taps)]
        return read_shard(self.store, self.targets, self.table, self.index.targets.shards[shard], columns)
