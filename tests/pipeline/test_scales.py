"""Scales hold their values, and have a few round labels whatever these are."""

import numpy as np
import pytest

from pipeline.report.scales import Scale, brief, powers_of_two, spanning


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_any_values_have_between_two_and_eight_labels_on_their_scale(seed: int, log: bool) -> None:
    chance = np.random.default_rng(seed)
    size = 10.0 ** chance.uniform(-6, 9)
    values = np.abs(chance.normal(1, 10.0 ** chance.uniform(-2, 0), chance.integers(1, 40))) * size
    scale = spanning(values.tolist(), 10, 350, log=log, zero=seed % 3 == 0)
    assert scale is not None
    assert all(10 <= scale(v) <= 350 for v in values)
    assert [scale(v) for v in sorted(values)] == sorted(scale(v) for v in values)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 8
    assert len({brief(t) for t in ticks}) == len(ticks)
    assert all(scale.low * (1 - 1e-9) <= t <= scale.high * (1 + 1e-9) for t in ticks)


def test_scale_has_no_place_for_nothing_and_clips_what_lies_outside() -> None:
    assert spanning([], 0, 1) is None
    assert spanning([0.0, -1.0, float("nan")], 0, 1, log=True) is None
    assert Scale(0, 1, 100, 200)(7) == 200
    assert Scale(1, 100, 0, 10, log=True)(10) == pytest.approx(5)
    assert spanning([3.0], 0, 1, zero=True) == Scale(0.0, 3.18, 0, 1)


def test_labels_are_short() -> None:
    assert [brief(v) for v in (0.002, 45, 1500, 2e6)] == ["0.002", "45", "1.5k", "2M"]
    assert [powers_of_two(v) for v in (512, 1024, 65536, 1500)] == ["512", "1k", "64k", "1,500"]
