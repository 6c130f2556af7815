"""The page of a sweep: arms, seeds, failures, and which orderings the seeds bear out."""

import copy
import math
from typing import Any

import pytest

from pipeline.report.orderings import ordering
from pipeline.report.sweep import sweep_page
from tests.pipeline.reports import sweep
from tests.pipeline.test_report import Read


def table(figures: dict[str, list[float]], better: str = "higher") -> dict[str, Any]:
    """A sweep of one axis: the figure of each value, seed by seed."""
    trials = [
        {"settings": {"loss": name}, "seed": seed, "state": "done", "figures": {"f": value}}
        for name, values in figures.items()
        for seed, value in enumerate(values)
    ]
    return {"axes": {"loss": list(figures)}, "figures": {"f": {"better": better, "unit": ""}}, "trials": trials}


def test_orderings_go_by_paired_differences_and_not_by_overlap() -> None:
    # the seeds spread far more than the two losses differ, but at every seed one is better by 0.02, give or take 0.001
    paired = table({"kl": [0.50, 0.70, 0.90], "both": [0.52, 0.721, 0.919], "ce": [0.1, 0.9, 0.5]})
    found = ordering(paired, "loss", "f")
    assert found is not None
    assert str(found) == "both > kl ≥ ce"
    assert found.means == pytest.approx({"both": 0.72, "kl": 0.7, "ce": 0.5})
    first, second = found.steps
    assert first.gain == pytest.approx(0.02)
    half = 4.302653 * 0.001 / math.sqrt(3)
    assert first.ci95 == pytest.approx([0.02 - half, 0.02 + half])
    assert (second.seeds, second.gain) == (3, pytest.approx(0.2))


def test_of_losses_the_lower_is_the_better() -> None:
    assert str(ordering(table({"a": [2.0, 2.1], "b": [1.0, 1.1]}, "lower"), "loss", "f")) == "b > a"
    assert str(ordering(table({"a": [2.0, 2.1], "b": [1.0, 1.1]}, "higher"), "loss", "f")) == "a > b"
    assert str(ordering(table({"a": [2.0], "b": [1.0]}), "loss", "f")) == "a ≥ b", "one seed bears out nothing"
    assert ordering(table({"a": [2.0]}), "loss", "f") is None


def test_a_failed_trial_does_not_tilt_the_ordering() -> None:
    whole = {
        "axes": {"init": ["x", "y"], "ratio": ["easy", "hard"]},
        "figures": {"f": {"better": "higher", "unit": ""}},
        "trials": [
            {"settings": {"init": init, "ratio": ratio}, "seed": seed, "figures": {"f": level + gain}}
            for init, gain in (("x", 0.1), ("y", 0.0))
            for ratio, level in (("easy", 0.8), ("hard", 0.2))
            for seed in (0, 1)
        ],
    }
    lacking = copy.deepcopy(whole)
    # without the easy trials of the better one its plain mean is the lower one
    for trial in lacking["trials"]:
        if trial["settings"] == {"init": "x", "ratio": "easy"}:
            trial["figures"] = {}
    for found in (ordering(whole, "init", "f"), ordering(lacking, "init", "f")):
        assert found is not None
        assert list(found.means) == ["x", "y"]
        assert found.steps[0].gain == pytest.approx(0.1)


def test_page_has_every_trial_arm_and_error() -> None:
    given = sweep()
    read = Read(sweep_page(given).html())
    assert read.anchors == ["arms", "orderings", "failed", "trials"]
    for arm in given["arms"]:
        assert {f["mean"] for f in arm["figures"].values()} <= read.values
    for trial in given["trials"]:
        assert trial["run"] in read.text
        assert set(trial["figures"].values()) <= read.values
    assert {float(len(given["arms"])), 3.0} <= read.values
    failed = sum(trial["state"] == "failed" for trial in given["trials"])
    assert read.text.count("the loss is no number") == failed > 0


def test_every_seed_is_a_point_of_the_plot() -> None:
    given = sweep()
    text = sweep_page(given).html()
    done = sum(trial["state"] == "done" for trial in given["trials"])
    assert text.count('class="hollow student"') == done * len(given["figures"])


@pytest.mark.parametrize("seeds", [1, 3])
def test_forty_arms_with_long_names_and_trials_still_to_run(seeds: int) -> None:
    axes = {"an axis with quite a long name": [f"value number {i} & more" for i in range(10)], "b": list("wxyz")}
    given = sweep(axes, seeds)
    for trial in given["trials"][-3:]:
        trial |= {"state": "pending", "seconds": None, "figures": {}}
    given["arms"][-1] |= {"n": 0, "figures": {}}
    read = Read(sweep_page(given).html())
    assert "not run yet" in read.text
    assert "value number 9 & more" in read.text
    assert "nan" not in read.text


def test_sweep_of_which_nothing_is_done_is_a_page_all_the_same() -> None:
    given = sweep()
    for trial in given["trials"]:
        trial |= {"state": "pending", "seconds": None, "figures": {}, "error": None}
    for arm in given["arms"]:
        arm |= {"n": 0, "figures": {}}
    assert Read(sweep_page({**given, "figures": {}}).html()).anchors == ["arms", "trials"]
    assert Read(sweep_page(given).html()).anchors == ["arms", "trials"]
