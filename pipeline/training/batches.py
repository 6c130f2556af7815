"""Batches from the cache: the rows of a micro-batch read from shards, decoded and collated ahead of need.

Threads read, decode and copy to the device; what they hold is bounded by the micro-batches and shards ahead.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pipeline.activations import Activation, decode_activation, pad
from pipeline.data.collate import (
    image_features,
    model_inputs,
    next_tokens,
    pad_tokens,
    predicting_positions,
    target_positions,
)
from pipeline.data.processors import Processor
from pipeline.data.samples import images_of
from pipeline.shards import Row
from pipeline.store import Store
from pipeline.targets import decode
from pipeline.training.batch import Batch, Copier, Sent, TapBatch, Totals
from pipeline.training.index import CacheIndex, Use
from pipeline.training.order import micro_batches
from pipeline.training.sources import Source
from pipeline.training.window import Part, ShardWindow
from pipeline.vision import vision_inputs
from schemas.artifacts import ArtifactRef
from schemas.errors import ShardCorrupt
from schemas.recipe import AnyPhase

# Shards are asked for so many steps before the step that needs them.
STEPS_AHEAD = 8
SAMPLES_PART: Part = ("samples", ())


class CachedBatches:
    """The micro-batches of one worker, for any phase and step."""

    def __init__(
        self,
        store: Store,
        samples: ArtifactRef,
        sources: Sequence[Source],
        layers: tuple[int, ...],
        processor: Processor,
        vocabulary: int,
        *,
        micro_batch: int = 8,
        padding: float = 0.05,
        readers: int = 2,
        held_out: float = 0.0,
    ) -> None:
        """``layers`` are those whose taps this student needs, ``vocabulary`` is the size of its own."""
        self.store, self.sources, self.layers = store, sources, layers
        self.cache = sources[0].cache
        self.micro_batch, self.padding, self.readers = micro_batch, padding, readers
        self.index = CacheIndex(store, samples, sources, held_out)
        self.processor = processor
        self.pad_id, self.image_token_id = processor.pad_id, processor.image_token_id
        # of one image, all of which have as many where features are cached
        self.patches = processor.positions([(1, 1)])[0] if self.cache.vision != "none" else 0
        self.window = ShardWindow(store, samples, sources, self.index, vocabulary)

    def stream(
        self,
        phase: AnyPhase,
        steps: range,
        seed: int,
        rank: int,
        world: int,
        device: torch.device,
        layers: tuple[int, ...] | None = None,
    ) -> Iterator[Batch]:
        """The worker's micro-batches of the phase's steps, on the device; only taps of ``layers`` where given."""
        copier = Copier(device)

        def make(items: np.ndarray, last: bool, totals: Totals) -> Sent:
            return copier.send(self.batch(phase, items, last, totals, layers))

        with ThreadPoolExecutor(self.readers) as pool, ThreadPoolExecutor(1) as ahead:
            waiting: deque[Future[Sent]] = deque()
            for step in steps:
                if step + STEPS_AHEAD in steps or step == steps.start:
                    ahead.submit(self._prepare, phase, seed, step + STEPS_AHEAD, layers)
                for items, last, totals in self.plan(phase, seed, step, rank, world):
                    waiting.append(pool.submit(make, items, last, totals))
                    if len(waiting) > self.readers:
                        yield copier.receive(waiting.popleft().result())
            while waiting:
                yield copier.receive(waiting.popleft().result())

    def plan(
        self, phase: AnyPhase, seed: int, step: int, rank: int, world: int
    ) -> list[tuple[np.ndarray, bool, Totals]]:
        """One worker's part of a step: each micro-batch's items, whether it is the last, and the step's totals."""
        items = self.index.step_items(use_of(phase), phase.batch, seed, step)
        return self._cut(items, rank, world)

    def held_out(
        self,
        rank: int,
        world: int,
        device: torch.device,
        *,
        even: bool,
        items: np.ndarray | None = None,
        layers: tuple[int, ...] = (),
    ) -> Iterator[Batch]:
        """The worker's part of the samples that are kept for validation, or these ``items``; taps of ``layers`` alone.

        ``even`` leaves out the last few where not every worker would get one, for engines that need them all at once.
        """
        items = self.index.first("held_out", self.index.count("held_out")) if items is None else items
        items = items[: len(items) // world * world] if even else items
        copier = Copier(device)
        for chosen, last, totals in self._cut(items, rank, world):
            found = replace(self.batch(None, chosen, last, totals), taps=self.taps(chosen, layers))
            yield copier.receive(copier.send(found))

    def _cut(self, items: np.ndarray, rank: int, world: int) -> list[tuple[np.ndarray, bool, Totals]]:
        index = self.index
        lengths, tapped = index.of(index.tokens, items), index.of(index.tapped, items)
        totals = Totals(
            samples=len(items),
            positions=int(index.of(index.positions, items).sum()),
            supervised=int(index.of(index.supervised, items).sum()),
            tapped=int(tapped.sum()),
            tap_tokens=int(lengths[tapped].sum()),
            tokens=int(lengths.sum()),
        )
        groups = [items[g][rank::world] for g in micro_batches(lengths, self.micro_batch, self.padding, world)]
        mine = [g for g in groups if len(g)]
        return [(group, i + 1 == len(mine), totals) for i, group in enumerate(mine)]

    def batch(
        self,
        phase: AnyPhase | None,
        items: np.ndarray,
        last: bool,
        totals: Totals,
        layers: tuple[int, ...] | None = None,
    ) -> Batch:
        """One micro-batch, on the CPU; without a phase the model's part alone."""
        found = Batch(items, last, totals, held_out=phase is None)
        if phase is not None:
            found = replace(found, taps=self.taps(items, self.layers if layers is None else layers))
        if phase is None or phase.kind == "distill":
            return self._with_model(found)
        assert found.taps is not None, "such a phase goes over tapped rows only"
        real = int(found.taps.mask.sum())
        return replace(found, tokens=real, padding=found.taps.mask.numel() - real)

    def first_taps(self, count: int) -> list[dict[int, tuple[Tensor, Tensor | None]]]:
        """Taps of the first ``count`` tapped rows by layer, each [L, D] in float32; the same on every worker."""
        rows = (self._tap_row(int(s), int(r), self.layers) for s, r in self.index.first("tapped", count))
        return [{layer: (u.wide(), a.wide() if a else None) for layer, (u, a) in taps.items()} for taps in rows]

    def taps(self, items: np.ndarray, layers: tuple[int, ...]) -> TapBatch | None:
        """The taps of those items that have them, right-padded."""
        rows = [self._tap_row(int(s), int(r), layers) for s, r in items if layers and self.index.tapped[s][r]]
        if not rows:
            return None
        lengths = torch.tensor([next(iter(r.values()))[0].values.shape[0] for r in rows])
        found = {}
        for n in layers:
            outputs = [a for r in rows if (a := r[n][1]) is not None]
            found[n] = (pad([r[n][0] for r in rows]), pad(outputs) if outputs else None)
        return TapBatch(found, torch.arange(int(lengths.max()))[None] < lengths[:, None])

    def sample_ids(self, items: np.ndarray) -> list[str]:
        """The ids of the samples at these places."""
        return [self.index.ids[shard][row] for shard, row in items]

    def _tap_row(
        self, shard: int, row: int, layers: tuple[int, ...]
    ) -> dict[int, tuple[Activation, Activation | None]]:
        data = self.window.rows(("taps", layers), shard)[row]
        tokens = int(self.index.tokens[shard][row])
        taps = self.cache.taps

        def part(name: str) -> Activation:
            return decode_activation(name, data, tokens, taps.dtype)

        stored = taps.targets == "stored"
        return {n: (part(f"tap_{n}_input"), part(f"tap_{n}_output") if stored else None) for n in layers}

    def _with_model(self, batch: Batch) -> Batch:
        """Adds what the model takes, and what it is to say."""
        items = batch.items
        samples = [self.window.rows(SAMPLES_PART, int(s))[r] for s, r in items]
        targets = [self._targets(number, items, samples) for number in range(len(self.sources))]
        tokens = [np.frombuffer(s["input_ids"], "<i4") for s in samples]
        spans = [np.frombuffer(s["spans"], "<i4").reshape(-1, 2) for s in samples]
        places = [
            target_positions(self.cache.positions, s, t, self.image_token_id)
            for s, t in zip(spans, tokens, strict=True)
        ]
        ids, _ = pad_tokens(tokens, self.pad_id)
        if self.cache.vision == "none":
            features = [image_features(self.processor, images_of(s)) for s in samples]
            inputs = model_inputs(ids, features, self.image_token_id)
        else:
            inputs = {"input_ids": ids} | vision_inputs(targets[0], self.patches)
        rows = np.repeat(np.arange(len(places)), [len(p) for p in places])
        gold = [next_tokens(t)[p] for t, p in zip(tokens, places, strict=True)]
        answers = [np.isin(p, predicting_positions(s)) for s, p in zip(spans, places, strict=True)]
        real = sum(len(t) for t in tokens)
        own, *others = (decode(s.cache.targets, rows) for s, rows in zip(self.sources, targets, strict=True))
        return replace(
            batch,
            inputs=inputs,
            positions=torch.from_numpy(np.stack([rows, np.concatenate(places)], 1)),
            gold=torch.from_numpy(np.concatenate(gold)),
            supervised=torch.from_numpy(np.concatenate(answers)),
            targets=own,
            others=tuple(others),
            tokens=real,
            padding=inputs["input_ids"].numel() - real,
        )

    def _targets(self, number: int, items: np.ndarray, samples: list[Row]) -> list[Row]:
        """One source's rows of these items, which are those samples."""
        rows = [self.window.rows(targets_part(number), int(s))[r] for s, r in items]
        for sample, row in zip(samples, rows, strict=True):
            if sample["sample_id"] != row["sample_id"]:
                where = self.sources[number].ref
                raise ShardCorrupt(f"{where}: row of {row['sample_id']} stands beside {sample['sample_id']}")
        return rows

    def _prepare(self, phase: AnyPhase, seed: int, step: int, layers: tuple[int, ...] | None) -> None:
        """Has the shards of a later step read; an error is met again, and raised, where they are used."""
        items = self.index.step_items(use_of(phase), phase.batch, seed, step)
        targets = [targets_part(number) for number in range(len(self.sources))]
        wanted = [SAMPLES_PART, *targets] if phase.kind == "distill" else []
        layers = self.layers if layers is None else layers
        for shard in dict.fromkeys(int(s) for s in items[:, 0]):
            taps: list[Part] = [("taps", layers)] if layers and self.index.tapped[shard].any() else []
            for part in [*wanted, *taps]:
                self.window.rows(part, shard)


def targets_part(number: int) -> Part:
    """The targets of a source, by its number."""
    return ("targets", (number,))


def use_of(phase: AnyPhase) -> Use:
    """The rows that a phase goes over: all of them where a model runs, else those with taps."""
    return "all" if phase.kind == "distill" else "tapped"
