"""The teacher's side: forwards that leave the columns of the ``targets`` table.

What the GPU does is queued by ``forward``, copies to pinned memory included, and nothing waits for it there;
``columns`` waits and encodes. A second thread can therefore encode and write one shard while the next is computed.

Shapes: B samples of one forward, L tokens, D hidden size, P positions of all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipeline.activations import pack
from pipeline.data.collate import Features, model_inputs, next_tokens, pad_tokens, target_positions
from pipeline.data.encoding import EncodedSample
from pipeline.data.processors import load_processor
from pipeline.models import body, check_logits, connector, decoder, head, load_model, logits_head, pick_device
from pipeline.ranks import Ranks
from pipeline.spread import spread
from pipeline.taps import TapBuffers, is_tapped, recorded
from pipeline.targets import encode, entropy, extract, logprobs, uniforms
from pipeline.vision import recorded_features
from schemas.config import CacheConfig, TeacherConfig
from schemas.placement import CachePlacement
from schemas.sections import Device
from schemas.tables import STATISTICS, VISION, targets_table

# Rows of logits held at once: 1,024 × 51,200 with their sums in float64 is 0.4 GB.
HEAD_CHUNK = 1024


@dataclass(frozen=True)
class PreparedSample:
    """A sample with what the model takes of its images, decoded where there is no GPU to wait."""

    sample: EncodedSample
    features: Features


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
    """All forwards of a shard; every event of ``done``, one a device, is reached when the copies are there."""

    ids: list[str]
    forwards: list[Forward]
    taps: TapBuffers
    vision: TapBuffers
    done: list[torch.cuda.Event]


class Teacher:
    """The frozen teacher of one worker, on one device or spread over several; of a split one, one rank's part."""

    def __init__(
        self,
        teacher: TeacherConfig,
        config: CacheConfig,
        tapped: tuple[int, ...],
        device: Device,
        place: CachePlacement,
        rank: int = 0,
    ) -> None:
        """Loads it.

        Raises:
            ConfigInvalid: the devices are too few, or its logits are not what its configuration says.
            TeacherLost: another rank of a split one ended.
        """
        self.config, self.tapped, self.batch = config, tapped, place.batch
        self.device, dtype = pick_device(device), getattr(torch, config.dtype)
        parts = spread(teacher, dtype, self.device, place)
        count = place.parts if place.split == "tensor" and rank == 0 else 1
        self.ranks = Ranks(count, self.device.type, partial(_follow, teacher, config, device, place))
        with self.ranks.together():
            self.model = load_model(teacher, dtype, self.device, parts)
            check_logits(self.model)
        self.devices = {p.device for p in self.model.parameters()} if self.device.type == "cuda" else set()
        processor = load_processor(teacher)
        self.pad_id, self.image_token_id = processor.pad_id, processor.image_token_id
        self.table = targets_table(config, tapped)
        self.most_tapped = 0  # tokens of a shard, of all so far

    def capture(self, samples: Sequence[PreparedSample]) -> dict[str, Sequence[object]]:
        """The columns of the samples' ``targets`` rows, in their order."""
        return self.columns(self.forward(samples))

    @torch.no_grad()
    def forward(self, samples: Sequence[PreparedSample]) -> Captured:
        """Queues all forwards of a shard on the devices and the copies of what they leave.

        Samples of similar length share a forward. A sample's draws do not depend on its neighbours beyond the
        rounding of the logits.
        """
        order = sorted(range(len(samples)), key=lambda i: (len(samples[i].sample.input_ids), i))
        batches = [order[at : at + self.batch] for at in range(0, len(order), self.batch)]
        tapped = [is_tapped(s.sample.sample_id, self.config.taps.fraction, self.config.seed) for s in samples]
        tokens = [len(s.sample.input_ids) if self.tapped and t else 0 for s, t in zip(samples, tapped, strict=True)]
        on_gpu = self.device.type == "cuda"
        self.most_tapped = max(self.most_tapped, sum(tokens))
        taps = TapBuffers(tokens, pinned=on_gpu, room=self.most_tapped)
        vision = TapBuffers([self._patches(s) for s in samples], pinned=on_gpu)
        with self.ranks.together():
            self.ranks.hand(samples)
            forwards = [self._forward(places, [samples[i] for i in places], taps, vision) for places in batches]
        done = [torch.cuda.current_stream(device).record_event() for device in self.devices]
        return Captured([s.sample.sample_id for s in samples], forwards, taps, vision, done)

    def columns(self, captured: Captured) -> dict[str, Sequence[object]]:
        """The columns of a shard, once its forwards are done."""
        for event in captured.done:
            event.synchronize()
        self.ranks.check()
        patches = captured.vision.tokens.tolist()
        rows: list[dict[str, object]] = [
            {"sample_id": name, "patches": count} for name, count in zip(captured.ids, patches, strict=True)
        ]
        for forward in captured.forwards:
            for place, row in zip(forward.places, self._rows(forward), strict=True):
                rows[place] |= row
        activations = captured.taps.columns() | captured.vision.columns()
        return {c.name: activations.get(c.name, [row.get(c.name) for row in rows]) for c in self.table.columns}

    def close(self) -> None:
        """Ends the other ranks of a split teacher."""
        self.ranks.close()

    def _patches(self, prepared: PreparedSample) -> int:
        """How many features of the sample's image are kept: one stands for each image token."""
        if self.config.vision == "none" or not prepared.features:
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
        images = [image for call in features for image in call]
        for place, sample in zip(places, samples, strict=True):
            mine = [images.pop(0) for _ in sample.images] if place in seen else []
            if mine:
                vision.keep(VISION, place, pack(torch.cat(mine), "bfloat16"))
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
        inputs = model_inputs(ids, [p.features for p in batch], self.image_token_id) | {"attention_mask": mask}
        return {
            name: self._to_device(t).to(self.model.dtype) if t.is_floating_point() else self._to_device(t)
            for name, t in inputs.items()
        }

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
            logits = logits_head(self.model)(hidden_PD).float()
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


def _follow(
    teacher: TeacherConfig, config: CacheConfig, device: Device, place: CachePlacement, rank: int
) -> Callable[[Sequence[PreparedSample]], object]:
    """What another rank does with the samples that it is handed: the same forwards, of which it records nothing."""
    return Teacher(teacher, config.model_copy(update={"vision": "none"}), (), device, place, rank).forward


def _to_host(tensor: Tensor) -> Tensor:
    """Queued behind what makes the tensor, into pinned memory; there once an event after it is reached."""
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
