"""The teacher's side: forwards that leave the columns of the ``targets`` table.

What the GPU does is queued by ``forward``, copies to pinned memory included, and nothing waits for it there;
``columns`` waits and encodes. A second thread can therefore encode and write one shard while the next is computed.

Shapes: B samples of one forward, L tokens, D hidden size, P positions of all of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.activations import pack
from pipeline.data.collate import next_tokens, pad_id_of, pad_tokens, target_positions
from pipeline.data.encoding import EncodedSample, image_token_of
from pipeline.models import body, connector, decoder, head, load_model, load_processor, pick_device
from pipeline.taps import TapBuffers, is_tapped, recorded
from pipeline.targets import encode, entropy, extract, logprobs, uniforms
from pipeline.vision import recorded_features
from schemas.config import CacheConfig
from schemas.sections import Device
from schemas.tables import STATISTICS, VISION, targets_table

# Rows of logits held at once: 1,024 × 51,200 with their sums in float64 is 0.4 GB.
HEAD_CHUNK = 1024


@dataclass(frozen=True)
class PreparedSample:
    """A sample with its pixel values [pixels of one image], decoded where there is no GPU to wait."""

    sample: EncodedSample
    pixels: np.ndarray | None


def paired(samples: Sequence[EncodedSample], pixels: Iterable[np.ndarray]) -> list[PreparedSample]:
    """The samples with their pixel values, of which there is one [pixels] for each that has an image, in order."""
    images = iter(pixels)
    return [PreparedSample(s, None if s.image is None else next(images)) for s in samples]


@dataclass(frozen=True)
class Forward:
    """What one forward leaves of its samples, on its way to the host.

    ``places`` are the samples' numbers in the shard, ``positions`` their numbers of positions; ``statistics`` and
    ``kept`` have P rows.
    """

    places: list[int]
    positions: list[int]
    statistics: list[Tensor]
    kept: list[Tensor]


@dataclass(frozen=True)
class Captured:
    """All forwards of a shard; ``done`` is reached when the copies are there."""

    ids: list[str]
    forwards: list[Forward]
    taps: TapBuffers
    vision: TapBuffers
    done: torch.cuda.Event | None


class Teacher:
    """The frozen teacher of one worker."""

    def __init__(self, path: str, config: CacheConfig, tapped: tuple[int, ...], device: Device, batch: int) -> None:
        self.config, self.tapped, self.batch = config, tapped, batch
        self.device = pick_device(device)
        self.model = load_model(path, getattr(torch, config.dtype), self.device)
        processor = load_processor(path)
        self.pad_id = pad_id_of(getattr(processor, "tokenizer", processor))
        self.image_token_id = image_token_of(processor)
        self.table = targets_table(config, tapped)

    def capture(self, samples: Sequence[PreparedSample]) -> dict[str, Sequence[object]]:
        """The columns of the samples' ``targets`` rows, in their order."""
        return self.columns(self.forward(samples))

    @torch.no_grad()
    def forward(self, samples: Sequence[PreparedSample]) -> Captured:
        """Queues all forwards of a shard on the device and the copies of what they leave.

        Samples of similar length share a forward. A sample's draws do not depend on its neighbours beyond the
        rounding of the logits.
        """
        order = sorted(range(len(samples)), key=lambda i: (len(samples[i].sample.input_ids), i))
        batches = [order[at : at + self.batch] for at in range(0, len(order), self.batch)]
        tapped = [is_tapped(s.sample.sample_id, self.config.taps.fraction, self.config.seed) for s in samples]
        tokens = [len(s.sample.input_ids) if self.tapped and t else 0 for s, t in zip(samples, tapped, strict=True)]
        on_gpu = self.device.type == "cuda"
        taps = TapBuffers(tokens, pinned=on_gpu)
        vision = TapBuffers([self._patches(s) for s in samples], pinned=on_gpu)
        forwards = [self._forward(places, [samples[i] for i in places], taps, vision) for places in batches]
        done = torch.cuda.Event() if on_gpu else None
        if done:
            done.record()
        return Captured([s.sample.sample_id for s in samples], forwards, taps, vision, done)

    def columns(self, captured: Captured) -> dict[str, Sequence[object]]:
        """The columns of a shard, once its forwards are done."""
        if captured.done:
            captured.done.synchronize()
        patches = captured.vision.tokens.tolist()
        rows: list[dict[str, object]] = [
            {"sample_id": name, "patches": count} for name, count in zip(captured.ids, patches, strict=True)
        ]
        for forward in captured.forwards:
            for place, row in zip(forward.places, self._rows(forward), strict=True):
                rows[place] |= row
        activations = captured.taps.columns() | captured.vision.columns()
        return {c.name: activations.get(c.name, [row.get(c.name) for row in rows]) for c in self.table.columns}

    def _patches(self, prepared: PreparedSample) -> int:
        """How many features of the sample's image are kept: one stands for each image token."""
        if self.config.vision == "none" or prepared.pixels is None:
            return 0
        return int((prepared.sample.input_ids == self.image_token_id).sum())

    def _forward(self, places: list[int], batch: list[PreparedSample], taps: TapBuffers, vision: TapBuffers) -> Forward:
        samples = [p.sample for p in batch]
        seen = [place for place in places if vision.tokens[place]]
        with (
            recorded(decoder(self.model).layers, self.tapped if taps.tokens[places].any() else ()) as found,
            recorded_features(connector(self.model) if seen else None) as features,
        ):
            hidden_BLD = body(self.model)(**self.inputs(batch), use_cache=False).last_hidden_state
        for place, value in zip(seen, (image for images in features for image in images), strict=True):
            vision.keep(VISION, place, pack(value, "bfloat16"))
        for layer, (value_in, value_out) in found.items():
            both = {f"tap_{layer}_input": value_in, f"tap_{layer}_output": value_out}
            if self.config.taps.targets == "recompute":
                del both[f"tap_{layer}_output"]
            for i, place in enumerate(places):
                for name, value in both.items() if taps.tokens[place] else ():
                    taps.keep(name, place, pack(value[i, : taps.tokens[place]], self.config.taps.dtype))
        positions = [
            target_positions(self.config.positions, s.spans, s.input_ids, self.image_token_id) for s in samples
        ]
        statistics, kept = self._targets(samples, positions, hidden_BLD)
        counts = [len(p) for p in positions]
        return Forward(places, counts, [_to_host(t) for t in statistics], [_to_host(t) for t in kept])

    def inputs(self, batch: list[PreparedSample]) -> dict[str, Tensor]:
        """What the model takes for one forward, on the device."""
        ids, mask = pad_tokens([p.sample.input_ids for p in batch], self.pad_id)
        inputs = {"input_ids": self._to_device(ids), "attention_mask": self._to_device(mask)}
        images = [p.pixels for p in batch if p.pixels is not None]
        if images:
            inputs["pixel_values"] = self._to_device(torch.from_numpy(np.stack(images))).to(self.model.dtype)
        return inputs

    def _targets(
        self, samples: list[EncodedSample], positions: list[np.ndarray], hidden_BLD: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Statistics and what is kept of the distribution, P rows each, sample after sample."""
        targets, length = self.config.targets, hidden_BLD.shape[1]
        flat = self._to_device(torch.from_numpy(np.concatenate([i * length + p for i, p in enumerate(positions)])))
        following = [next_tokens(s.input_ids)[p] for s, p in zip(samples, positions, strict=True)]
        gold = self._to_device(torch.from_numpy(np.concatenate(following)))
        chance = None
        if targets.kind == "sampled":
            drawn = [
                uniforms(s.sample_id, self.config.seed, len(s.input_ids), targets.draws)[p]
                for s, p in zip(samples, positions, strict=True)
            ]
            chance = self._to_device(torch.from_numpy(np.concatenate(drawn)))
        parts = []
        for at in range(0, max(len(flat), 1), HEAD_CHUNK):
            part = slice(at, at + HEAD_CHUNK)
            hidden_PD = hidden_BLD.flatten(0, 1)[flat[part]]
            logits = head(self.model)(hidden_PD).float()
            own = logprobs(logits, targets.temperature)
            lse = logits.logsumexp(-1)
            gold_logprob = logits.gather(1, gold[part, None])[:, 0] - lse
            kept = extract(targets, own, hidden_PD, None if chance is None else chance[part])
            parts.append((lse, gold_logprob, entropy(own), *kept))
        joined = [torch.cat(p) for p in zip(*parts, strict=True)]
        return joined[: len(STATISTICS)], joined[len(STATISTICS) :]

    def _rows(self, forward: Forward) -> list[dict[str, object]]:
        """The rows of one forward's samples, but for their ids."""
        vocabulary = head(self.model).out_features
        rows = []
        kept = zip(*(t.split(forward.positions) for t in forward.kept), strict=True)
        statistics = zip(*(t.split(forward.positions) for t in forward.statistics), strict=True)
        for positions, mine, stats in zip(forward.positions, kept, statistics, strict=True):
            row: dict[str, object] = {"positions": positions, **encode(self.config.targets, mine, vocabulary)}
            for (name, dtype), values in zip(STATISTICS.items(), stats, strict=True):
                row[name] = values.numpy().astype(dtype).tobytes()
            rows.append(row)
        return rows

    def _to_device(self, tensor: Tensor) -> Tensor:
        """Queued behind what the device does, without waiting for it."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor


def _to_host(tensor: Tensor) -> Tensor:
    """Queued behind what makes the tensor, into pinned memory; there once an event after it is reached."""
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
