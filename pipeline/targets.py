"""Targets of the teacher's distribution: what each kind captures from logits, and how it is written and read.

``sampled``: N draws with replacement (random-sampling distillation, arXiv 2503.16870). ``E[count / N]`` is the
teacher's probability, so the gradient of the cross-entropy to the draws is an unbiased estimate of that to the whole
distribution. Bytes a position: 1, and 3 a distinct id. ``top_k``: 4 bytes an id. ``final_hidden``: 2 bytes a channel,
or 1 and 4 a position; the whole distribution follows through the frozen head. Ids take 2 bytes more where the
vocabulary is over 65,536. All kinds keep log-sum-exp, gold log-probability and entropy besides, 8 bytes a position.

Shapes: P positions, V vocabulary, N draws, K kept, D hidden size, E distinct (position, id) pairs.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pipeline.activations import Activation, decode_activation, encode_activation, join, pack
from schemas.config import FinalHiddenTargets, SampledTargets, TargetsConfig, TopKTargets

UINT16_IDS = 65536
Row = Mapping[str, Any]


@dataclass(frozen=True)
class SparseTargets:
    """Draws of a batch: ``ids`` [E] int64, ``share`` [E] float32 (count / N), ``row`` [E] int64 in [0, P), ascending.

    ``entropy`` [P] float32 is the teacher's exact entropy at the capture temperature, in nats. ``offsets`` [P + 1] are
    where each position's pairs begin; always on the CPU, so that to take a part of them waits for no device.
    """

    ids: Tensor
    share: Tensor
    row: Tensor
    entropy: Tensor
    offsets: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "SparseTargets":
        """The same with every tensor that belongs on the device changed."""
        return SparseTargets(change(self.ids), change(self.share), change(self.row), change(self.entropy), self.offsets)


@dataclass(frozen=True)
class TopTargets:
    """The most probable tokens: ``ids`` [P, K] int64 and ``logprobs`` [P, K] float32 over the whole vocabulary."""

    ids: Tensor
    logprobs: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "TopTargets":
        """The same with every tensor changed."""
        return TopTargets(change(self.ids), change(self.logprobs))


@dataclass(frozen=True)
class HiddenTargets:
    """The teacher's state before the head, [P, D]."""

    hidden: Activation

    def map(self, change: Callable[[Tensor], Tensor]) -> "HiddenTargets":
        """The same with every tensor changed."""
        return HiddenTargets(self.hidden.map(change))


Targets = SparseTargets | TopTargets | HiddenTargets


def uniforms(sample_id: str, seed: int, tokens: int, draws: int) -> np.ndarray:
    """float64[tokens, N] in [0, 1): a pure function of sample, position and seed, whatever the batch."""
    key = hashlib.sha256(f"{seed}:{sample_id}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random((tokens, draws))


def logprobs(logits_PV: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [P, V] in float32, at ``temperature``."""
    return torch.log_softmax(logits_PV.float() / temperature, -1)


def draw(logprobs_PV: Tensor, uniforms_PN: Tensor) -> Tensor:
    """Token ids [P, N] in int32, by inverting the cumulative distribution."""
    cdf = logprobs_PV.exp().cumsum(-1, dtype=torch.float64)
    # the last entry is 1 up to rounding; below it, a draw meets a token of some probability
    total = cdf[:, -1:]
    chance = torch.minimum(uniforms_PN * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, chance, right=True, out_int32=True)


def entropy(logprobs_PV: Tensor) -> Tensor:
    """Entropy [P] in nats."""
    return torch.special.entr(logprobs_PV.exp()).sum(-1)


def extract(config: TargetsConfig, logprobs_PV: Tensor, hidden_PD: Tensor, uniforms_PN: Tensor | None) -> list[Tensor]:
    """What is kept of some positions, still on the device; ``encode`` takes it for all positions of a sample."""
    if config.kind == "sampled":
        assert uniforms_PN is not None
        return [draw(logprobs_PV, uniforms_PN)]
    if config.kind == "top_k":
        found = logprobs_PV.topk(min(config.k, logprobs_PV.shape[-1]))  # most probable first
        return [found.indices.int(), found.values]
    packed = pack(hidden_PD, config.dtype)
    return [packed.values] if packed.scale is None else [packed.values, packed.scale]


def encode(config: TargetsConfig, kept: Sequence[Tensor], vocabulary: int) -> dict[str, object]:
    """The columns of one sample, of what ``extract`` kept, on the CPU."""
    if config.kind == "sampled":
        return encode_draws(kept[0].numpy(), vocabulary)
    if config.kind == "top_k":
        ids, values = (t.numpy() for t in kept)
        return {**_encode_ids(ids, vocabulary), "logprobs": values.astype("<f2").tobytes()}
    return dict(encode_activation("hidden", Activation(*kept)))


def encode_draws(ids_PN: np.ndarray, vocabulary: int) -> dict[str, object]:
    """The columns ``ids``, ``ids_dtype``, ``counts`` and ``n_unique`` of one sample."""
    ordered = np.sort(ids_PN, axis=1)
    first = np.ones(ordered.shape, bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    starts = np.flatnonzero(first)
    counts = np.diff(np.append(starts, ordered.size))
    return {
        **_encode_ids(ordered.ravel()[starts], vocabulary),
        "counts": counts.astype(np.uint8).tobytes(),
        "n_unique": first.sum(1).astype(np.uint8).tobytes(),
    }


def _encode_ids(ids: np.ndarray, vocabulary: int) -> dict[str, object]:
    dtype = "uint16" if vocabulary <= UINT16_IDS else "uint32"
    return {"ids": ids.astype(np.dtype(dtype).newbyteorder("<")).tobytes(), "ids_dtype": dtype}


def decode(config: TargetsConfig, rows: Sequence[Row]) -> Targets:
    """The targets of several samples, one after the other; ``rows`` are rows of the ``targets`` table."""
    if config.kind == "sampled":
        return _decode_draws(config, rows)
    if config.kind == "top_k":
        return _decode_top(config, rows)
    return _decode_hidden(config, rows)


def _joined(rows: Sequence[Row], name: str, dtype: str | None = None) -> np.ndarray:
    """A column's values over the rows; ids have the type that each row names."""
    return np.concatenate([np.frombuffer(cast(bytes, r[name]), dtype or str(r["ids_dtype"])) for r in rows])


def _decode_draws(config: SampledTargets, rows: Sequence[Row]) -> SparseTargets:
    n_unique = _joined(rows, "n_unique", "u1").astype(np.int64)
    return SparseTargets(
        ids=torch.from_numpy(_joined(rows, "ids").astype(np.int64)),
        share=torch.from_numpy(_joined(rows, "counts", "u1").astype(np.float32) / config.draws),
        row=torch.from_numpy(np.repeat(np.arange(len(n_unique)), n_unique)),
        entropy=torch.from_numpy(_joined(rows, "entropy", "<f2").astype(np.float32)),
        offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(n_unique)])),
    )


def _decode_top(config: TopKTargets, rows: Sequence[Row]) -> TopTargets:
    positions = sum(int(r["positions"]) for r in rows)
    ids, logprobs = _joined(rows, "ids").astype(np.int64), _joined(rows, "logprobs", "<f2").astype(np.float32)
    assert len(ids) <= positions * config.k
    return TopTargets(torch.from_numpy(ids).view(positions, -1), torch.from_numpy(logprobs).view(positions, -1))


def _decode_hidden(config: FinalHiddenTargets, rows: Sequence[Row]) -> HiddenTargets:
    return HiddenTargets(join([decode_activation("hidden", r, int(r["positions"]), config.dtype) for r in rows]))
