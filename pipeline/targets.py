"""Random-sampling targets: N draws with replacement from the teacher's distribution a position (arXiv 2503.16870).

``E[count / N]`` is the teacher's probability, so the gradient of the cross-entropy to the draws is an unbiased estimate
of the gradient to the full distribution. Bytes a position: 1 for the number of distinct ids, then 3 an id (uint16 id
and uint8 count; 5 where the vocabulary needs uint32), and 8 for log-sum-exp, gold log-probability and entropy.

Shapes: P positions, V vocabulary, N draws, E distinct (position, id) pairs.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from schemas.config import SampledTargets

UINT16_IDS = 65536


@dataclass(frozen=True)
class SparseTargets:
    """Draws of a batch: ``ids`` [E] int64, ``share`` [E] float32 (count / N), ``row`` [E] int64 in [0, P), ascending.

    ``entropy`` [P] float32 is the teacher's exact entropy at the capture temperature, in nats.
    """

    ids: Tensor
    share: Tensor
    row: Tensor
    entropy: Tensor

    def to(self, device: torch.device) -> "SparseTargets":
        """The same on another device."""
        return SparseTargets(*(t.to(device, non_blocking=True) for t in (self.ids, self.share, self.row, self.entropy)))


def uniforms(sample_id: str, seed: int, tokens: int, draws: int) -> np.ndarray:
    """float64[tokens, N] in [0, 1): a pure function of sample, position and seed, whatever the batch."""
    key = hashlib.sha256(f"{seed}:{sample_id}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random((tokens, draws))


def draw(logits_PV: Tensor, uniforms_PN: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Token ids [P, N] by inverting the cumulative distribution, and entropy [P] in nats, at ``temperature``."""
    logp = torch.log_softmax(logits_PV.double() / temperature, -1)
    p = logp.exp()
    cdf = p.cumsum(-1)
    # the last entry is 1 up to rounding; dividing makes a draw beyond it impossible
    ids = torch.searchsorted(cdf / cdf[:, -1:], uniforms_PN, right=True)
    return ids, -(p * logp).sum(-1)


def encode_draws(ids_PN: np.ndarray, vocabulary: int) -> dict[str, object]:
    """The columns ``ids``, ``ids_dtype``, ``counts`` and ``n_unique`` of one sample."""
    ordered = np.sort(ids_PN, axis=1)
    first = np.ones(ordered.shape, bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    starts = np.flatnonzero(first)
    counts = np.diff(np.append(starts, ordered.size))
    dtype = "uint16" if vocabulary <= UINT16_IDS else "uint32"
    return {
        "ids": ordered.ravel()[starts].astype(f"<u{2 if dtype == 'uint16' else 4}").tobytes(),
        "ids_dtype": dtype,
        "counts": counts.astype(np.uint8).tobytes(),
        "n_unique": first.sum(1).astype(np.uint8).tobytes(),
    }


def decode_draws(rows: list[dict[str, object]], config: SampledTargets) -> SparseTargets:
    """The targets of several samples, one after the other; ``rows`` are rows of the ``targets`` table."""

    def joined(name: str, dtype: str | None = None) -> np.ndarray:
        parts = [np.frombuffer(r[name], dtype or np.dtype(str(r["ids_dtype"]))) for r in rows]  # type: ignore[call-overload]
        return np.concatenate(parts)

    n_unique = joined("n_unique", "u1").astype(np.int64)
    return SparseTargets(
        ids=torch.from_numpy(joined("ids").astype(np.int64)),
        share=torch.from_numpy(joined("counts", "u1").astype(np.float32) / config.draws),
        row=torch.from_numpy(np.repeat(np.arange(len(n_unique)), n_unique)),
        entropy=torch.from_numpy(joined("entropy", "<f2").astype(np.float32)),
    )
