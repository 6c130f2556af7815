"""The order of training is arithmetic: a pure function of seed, epoch and the shards' sizes.

Rank and world size only slice it, and a checkpoint needs no data state beyond the step.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

# Shards shuffled together: few enough to be held in memory, enough to mix well.
WINDOW = 8


def epoch_order(seed: int, epoch: int, shard_rows: Sequence[int], window: int = WINDOW) -> np.ndarray:
    """int64[rows, 2] of (shard, row): a permutation of all rows, taken from ``window`` shards at a time."""
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    shards = rng.permutation(len(shard_rows))
    parts = []
    for at in range(0, len(shards), window):
        items = np.concatenate(
            [np.stack([np.full(shard_rows[s], s), np.arange(shard_rows[s])], 1) for s in shards[at : at + window]]
        )
        parts.append(items[rng.permutation(len(items))])
    return np.concatenate(parts).astype(np.int64)


@lru_cache(maxsize=2)
def _remembered(seed: int, epoch: int, shard_rows: tuple[int, ...]) -> np.ndarray:
    return epoch_order(seed, epoch, shard_rows)


def batch_items(seed: int, step: int, batch: int, shard_rows: Sequence[int]) -> np.ndarray:
    """int64[batch, 2] of (shard, row): the global batch of a step, from the endless row of epochs."""
    total, sizes = sum(shard_rows), tuple(shard_rows)
    parts = []
    at, stop = step * batch, (step + 1) * batch
    while at < stop:
        epoch, offset = divmod(at, total)
        taken = _remembered(seed, epoch, sizes)[offset : offset + stop - at]
        parts.append(taken)
        at += len(taken)
    return np.concatenate(parts)


def rank_slice(items: np.ndarray, rank: int, world: int) -> np.ndarray:
    """The rows of a global batch that one of ``world`` workers takes."""
    return items[rank::world]
