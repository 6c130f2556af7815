"""Batches from the cache: the rows of a step read from shards, decoded and collated, ahead of need in one thread.

``CacheIndex`` knows what every row is (its tokens, whether it is tapped) from two small columns; ``CachedBatches``
reads shards through a bounded cache.
"""

from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.activations import Activation, decode_activation, pad
from pipeline.data.collate import pad_id_of, pad_tokens, pixel_values, target_positions
from pipeline.data.encoding import image_token_of
from pipeline.shards import Row, read_manifest, read_shard, rows_of
from pipeline.store import Store
from pipeline.taps import is_tapped
from pipeline.targets import Targets, decode
from pipeline.training.order import WINDOW, batch_items, rank_slice
from schemas.artifacts import ArtifactRef
from schemas.config import AlignPhase, CacheConfig, DistillPhase
from schemas.errors import ConfigInvalid, ShardCorrupt
from schemas.tables import SAMPLES, Table, tap_columns, targets_table

# Batches decoded ahead of the step that needs them.
AHEAD = 2
# Columns of the targets that no loss reads.
UNREAD = ("lse", "gold_logprob")
# Decoded shards kept in memory; a small cache is then read once, a large one window by window.
MEMORY_BYTES = 2 * 2**30


@dataclass(frozen=True)
class TapBatch:
    """Inputs and outputs (None: to be recomputed) by layer, each [B, L, D], and the mask [B, L] of real tokens."""

    layers: dict[int, tuple[Activation, Activation | None]]
    mask: Tensor


@dataclass(frozen=True)
class Batch:
    """One worker's part of a step.

    ``inputs`` are the model's keywords (empty in ``align``); ``positions`` [P, 2] are (row, position) pairs with their
    ``gold`` tokens [P] and ``targets``. The ``global_…`` counts are over all workers: predicting positions, and samples
    and tokens of those that have taps.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    positions: Tensor | None = None
    gold: Tensor | None = None
    targets: Targets | None = None
    taps: TapBatch | None = None
    global_positions: int = 0
    global_tapped: int = 0
    global_tap_tokens: int = 0

    def to(self, device: torch.device) -> "Batch":
        """The same on another device."""

        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device, non_blocking=True)

        taps = self.taps and TapBatch(
            {k: (u.to(device), a and a.to(device)) for k, (u, a) in self.taps.layers.items()},
            self.taps.mask.to(device),
        )
        return replace(
            self,
            inputs={k: v.to(device, non_blocking=True) for k, v in self.inputs.items()},
            positions=move(self.positions),
            gold=move(self.gold),
            targets=self.targets and self.targets.to(device),
            taps=taps,
        )


class CacheIndex:
    """What every cached row is, by shard: token counts, positions with a target, tapped or not."""

    def __init__(
        self, store: Store, samples: ArtifactRef, targets: ArtifactRef, cache: CacheConfig, table: Table
    ) -> None:
        self.samples, self.targets = read_manifest(store, samples), read_manifest(store, targets)
        if self.samples.shard_rows != self.targets.shard_rows:
            raise ShardCorrupt(f"{targets}: its shards do not have the rows of {samples}'s")
        self.tokens, self.positions, self.tapped = [], [], []
        for info, cached in zip(self.samples.shards, self.targets.shards, strict=True):
            data = read_shard(store, samples, SAMPLES, info, ["sample_id", "tokens"])
            self.tokens.append(data["tokens"].to_numpy())
            self.positions.append(read_shard(store, targets, table, cached, ["positions"])["positions"].to_numpy())
            ids = data["sample_id"].to_pylist()
            self.tapped.append(np.array([is_tapped(i, cache.taps.fraction, cache.seed) for i in ids]))

    def step_items(self, phase: AlignPhase | DistillPhase, seed: int, step: int) -> np.ndarray:
        """int64[batch, 2] of (shard, row): the global batch of a step; ``align`` goes over tapped rows only."""
        if phase.kind == "distill":
            return batch_items(seed, step, phase.batch, self.samples.shard_rows)
        rows = [np.flatnonzero(t) for t in self.tapped]
        if not any(len(r) for r in rows):
            raise ConfigInvalid(
                f"cache.taps.fraction: none of {self.samples.rows} samples is tapped, but the recipe aligns mixers; "
                "cache with a larger fraction"
            )
        items = batch_items(seed, step, phase.batch, [len(r) for r in rows])
        return np.array([[shard, rows[shard][row]] for shard, row in items])

    def count(self, values: list[np.ndarray], items: np.ndarray, *, tapped: bool) -> int:
        """Sum of a per-row value over items, over the tapped ones only where asked."""
        return int(sum(values[s][r] for s, r in items if not tapped or self.tapped[s][r]))


class CachedBatches:
    """The batches of one worker, for any phase and step."""

    def __init__(
        self,
        store: Store,
        samples: ArtifactRef,
        targets: ArtifactRef,
        cache: CacheConfig,
        tapped: tuple[int, ...],
        layers: tuple[int, ...],
        processor: Any,
    ) -> None:
        """``tapped`` are the layers that the cache holds, ``layers`` those that this student needs."""
        self.store, self.refs, self.cache, self.layers = store, (samples, targets), cache, layers
        self.table = targets_table(cache, tapped)
        self.index = CacheIndex(store, samples, targets, cache, self.table)
        self.processor = processor
        self.pad_id = pad_id_of(getattr(processor, "tokenizer", processor))
        self.image_token_id = image_token_of(processor)
        self.tap_names = [c.name for layer in layers for c in tap_columns(layer, cache.taps)]
        self.target_names = [c.name for c in targets_table(cache, ()).columns if c.name not in UNREAD]
        self._shards: OrderedDict[tuple[str, int], tuple[list[Row], int]] = OrderedDict()
        self._held = 0

    def stream(self, phase: AlignPhase | DistillPhase, seed: int, start: int, rank: int, world: int) -> Iterator[Batch]:
        """The worker's batches of the phase's steps from ``start`` on."""
        with ThreadPoolExecutor(1) as pool:
            waiting: list[Future[Batch]] = []
            for step in range(start, phase.steps + AHEAD):
                if step < phase.steps:
                    waiting.append(pool.submit(self.batch, phase, seed, step, rank, world))
                if step >= start + AHEAD and waiting:
                    yield waiting.pop(0).result()
            for future in waiting:
                yield future.result()

    def batch(self, phase: AlignPhase | DistillPhase, seed: int, step: int, rank: int, world: int) -> Batch:
        """The worker's part of one step."""
        items = self.index.step_items(phase, seed, step)
        mine = rank_slice(items, rank, world)
        index = self.index
        base = Batch(
            global_positions=index.count(index.positions, items, tapped=False),
            global_tapped=int(sum(index.tapped[s][r] for s, r in items)),
            global_tap_tokens=index.count(index.tokens, items, tapped=True),
        )
        taps = self.taps(mine)
        if phase.kind == "align":
            return replace(base, taps=taps)
        return replace(base, taps=taps, **self._model_part(mine))

    def first_taps(self, count: int) -> list[dict[int, tuple[Tensor, Tensor | None]]]:
        """Taps of the first ``count`` tapped rows by layer, each [L, D] in float32; the same on every worker."""
        found: list[dict[int, tuple[Tensor, Tensor | None]]] = []
        for shard, flags in enumerate(self.index.tapped):
            for row in np.flatnonzero(flags)[: count - len(found)]:
                taps = self._tap_row(shard, int(row))
                found.append({layer: (u.wide(), a.wide() if a else None) for layer, (u, a) in taps.items()})
            if len(found) == count:
                break
        return found

    def taps(self, items: np.ndarray) -> TapBatch | None:
        """The taps of those items that have them, right-padded."""
        rows = [self._tap_row(int(s), int(r)) for s, r in items if self.layers and self.index.tapped[s][r]]
        if not rows:
            return None
        lengths = torch.tensor([next(iter(r.values()))[0].values.shape[0] for r in rows])
        layers = {}
        for n in self.layers:
            outputs = [a for r in rows if (a := r[n][1]) is not None]
            layers[n] = (pad([r[n][0] for r in rows]), pad(outputs) if outputs else None)
        return TapBatch(layers, torch.arange(int(lengths.max()))[None] < lengths[:, None])

    def _tap_row(self, shard: int, row: int) -> dict[int, tuple[Activation, Activation | None]]:
        data = self._rows("taps", shard)[row]
        tokens = int(self.index.tokens[shard][row])
        taps = self.cache.taps

        def part(name: str) -> Activation:
            return decode_activation(name, data, tokens, taps.dtype)

        stored = taps.targets == "stored"
        return {n: (part(f"tap_{n}_input"), part(f"tap_{n}_output") if stored else None) for n in self.layers}

    def _model_part(self, items: np.ndarray) -> dict[str, Any]:
        samples = [self._rows("samples", int(s))[r] for s, r in items]
        targets = [self._rows("targets", int(s))[r] for s, r in items]
        for sample, target in zip(samples, targets, strict=True):
            if sample["sample_id"] != target["sample_id"]:
                raise ShardCorrupt(f"{self.refs[1]}: row of {target['sample_id']} stands beside {sample['sample_id']}")
        tokens = [np.frombuffer(s["input_ids"], "<i4") for s in samples]
        spans = [np.frombuffer(s["spans"], "<i4").reshape(-1, 2) for s in samples]
        places = [
            target_positions(self.cache.positions, s, t, self.image_token_id)
            for s, t in zip(spans, tokens, strict=True)
        ]
        ids, mask = pad_tokens(tokens, self.pad_id)
        inputs = {"input_ids": ids, "attention_mask": mask}
        pixels = pixel_values(self.processor, [s["image"] for s in samples])
        if pixels is not None:
            inputs["pixel_values"] = pixels
        rows = np.repeat(np.arange(len(places)), [len(p) for p in places])
        gold = np.concatenate([t[p + 1] for t, p in zip(tokens, places, strict=True)]).astype(np.int64)
        return {
            "inputs": inputs,
            "positions": torch.from_numpy(np.stack([rows, np.concatenate(places)], 1)),
            "gold": torch.from_numpy(gold),
            "targets": decode(self.cache.targets, targets),
        }

    def _rows(self, part: str, shard: int) -> list[Row]:
        """Rows of one shard, of the samples, the targets or the taps; the latest used stay in memory.

        At least one window of shards stays, or every step would read them anew.
        """
        key = (part, shard)
        if key not in self._shards:
            data = self._read(part, shard)
            self._shards[key] = (rows_of(data), data.nbytes)
            self._held += data.nbytes
            while self._held > MEMORY_BYTES and len(self._shards) > 3 * (WINDOW + 1):
                _, (_, freed) = self._shards.popitem(last=False)
                self._held -= freed
        self._shards.move_to_end(key)
        return self._shards[key][0]

    def _read(self, part: str, shard: int) -> pa.Table:
        samples, targets = self.refs
        table: Table = SAMPLES if part == "samples" else self.table
        columns = {
            "samples": ["sample_id", "input_ids", "spans", "image"],
            "targets": self.target_names,
            "taps": self.tap_names,
        }[part]
        manifest = self.index.samples if part == "samples" else self.index.targets
        ref = samples if part == "samples" else targets
        return read_shard(self.store, ref, table, manifest.shards[shard], columns)
