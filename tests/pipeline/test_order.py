import itertools

import numpy as np
import pytest

from pipeline.training.order import batch_items, epoch_order, rank_slice
from pipeline.training.schedule import learning_rate
from schemas.config import AlignPhase

SHARDS = (4, 7, 1, 5, 5, 3)


def test_epoch_is_a_permutation_that_only_seed_and_epoch_change() -> None:
    order = epoch_order(0, 0, SHARDS, window=2)
    every = {(s, r) for s, n in enumerate(SHARDS) for r in range(n)}
    assert {tuple(i) for i in order} == every
    assert len(order) == len(every)
    assert np.array_equal(order, epoch_order(0, 0, SHARDS, window=2))
    assert not np.array_equal(order, epoch_order(0, 1, SHARDS, window=2))
    assert not np.array_equal(order, epoch_order(1, 0, SHARDS, window=2))


def test_only_a_window_of_shards_is_open_at_a_time() -> None:
    order = epoch_order(3, 0, SHARDS, window=2)
    shards = list(dict.fromkeys(order[:, 0].tolist()))
    for at in range(0, len(shards), 2):
        window = set(shards[at : at + 2])
        places = [i for i, s in enumerate(order[:, 0]) if s in window]
        assert places == list(range(places[0], places[0] + len(places)))


def test_batches_walk_through_the_epochs_without_a_gap_or_a_repeat() -> None:
    batches = [batch_items(0, step, 4, SHARDS) for step in range(13)]
    stream = np.concatenate(batches)
    expected = np.concatenate([epoch_order(0, e, SHARDS) for e in range(3)])[: len(stream)]
    assert np.array_equal(stream, expected)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_world_size_takes_the_same_global_batch(world: int) -> None:
    items = batch_items(0, 5, 8, SHARDS)
    slices = [rank_slice(items, rank, world) for rank in range(world)]
    assert sorted(map(tuple, np.concatenate(slices))) == sorted(map(tuple, items))
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


def test_schedule_warms_up_holds_and_decays() -> None:
    phase = AlignPhase(kind="align", steps=10, batch=1, lr=1.0, warmup_steps=2, decay_steps=4)
    rates = [learning_rate(phase, s) for s in range(10)]
    assert rates[:6] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[5:]))
