"""The order of training is arithmetic: a pure function of seed, epoch and the shards' usable rows.

Rank and world size only slice it, and a checkpoint needs no data state beyond the step. How a step's samples are cut
into micro-batches is arithmetic as well, of their lengths.
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


def micro_batches(lengths: Sequence[int] | np.ndarray, rows: int, padding: float, world: int) -> list[np.ndarray]:
    """Indices of a step's samples, cut into micro-batches over all workers; a worker takes every ``world``-th of each.

    Samples stand by length, longest first, so that workers get about the same work and an allocator its largest
    request at once. A micro-batch has at most ``rows`` samples a worker, and of its tokens at most the share
    ``padding`` is padding. All but the last have a sample for every worker.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    rounds = [order[at : at + world] for at in range(0, len(order), world)]
    # to and fro, or the first worker would always have the longest
    rounds = [r[::-1] if i % 2 and len(r) == world else r for i, r in enumerate(rounds)]
    groups: list[list[np.ndarray]] = []
    for dealt in rounds:
        if groups and len(groups[-1]) < rows and _padding(lengths, [*groups[-1], dealt], world) <= padding:
            groups[-1].append(dealt)
        else:
            groups.append([dealt])
    return [np.concatenate(group) for group in groups]


def _padding(lengths: np.ndarray, group: list[np.ndarray], world: int) -> float:
    """The largest share of padding among the workers' parts of a micro-batch."""
    places = np.concatenate(group)
    parts = [lengths[places[rank::world]] for rank in range(world)]
    return max(1 - part.sum() / (len(part) * part.max()) for part in parts if len(part))
