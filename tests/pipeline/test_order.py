import itertools

import numpy as np
import pytest

from pipeline.training.order import batch_items, epoch_order, micro_batches
from pipeline.training.schedule import learning_rate
from schemas.recipe import AlignPhase, DistillPhase, Schedule

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


@pytest.mark.parametrize("padding", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_micro_batches_share_all_samples_with_little_padding(world: int, padding: float) -> None:
    lengths = np.random.default_rng(0).integers(40, 400, 48)
    groups = micro_batches(lengths, 8, padding, world)
    assert sorted(np.concatenate(groups)) == list(range(48))
    assert all(len(g) % world == 0 and len(g) <= 8 * world for g in groups[:-1])
    for group in groups:
        for rank in range(world):
            mine = lengths[group[rank::world]]
            assert len(mine) == 0 or 1 - mine.sum() / (len(mine) * mine.max()) <= padding
    work = [sum(int(lengths[g[r::world]].sum()) for g in groups) for r in range(world)]
    assert max(work) <= 1.05 * min(work)


def test_samples_of_one_length_make_full_micro_batches() -> None:
    groups = micro_batches([7] * 30, 4, 0.05, 2)
    assert [len(g) for g in groups] == [8, 8, 8, 6]


def test_schedule_warms_up_holds_and_decays() -> None:
    phase = AlignPhase(kind="align", steps=10, batch=1, lr=1.0, warmup_steps=2, decay_steps=4)
    rates = [learning_rate(phase.schedule(100), s) for s in range(10)]
    assert rates[:6] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[5:]))


def test_matvlms_schedule_in_samples_is_a_thousand_steps_of_warm_up_and_of_decay() -> None:
    phase = DistillPhase(kind="distill", epochs=1, batch=64, warmup_samples=64_000, decay_samples=64_000)
    assert phase.schedule(665_298) == Schedule(10_396, 1000, 1000, 2e-4)
    with pytest.raises(ValueError, match=r"warm-up \(1000 steps\) and decay \(1000\) exceed the phase's 16 steps"):
        phase.schedule(1024)
