"""``decant ablate`` in a Ray session: several trials at once, failures among them, and what a rerun does."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import jobs.ablate
import jobs.distill
import jobs.evaluate
from jobs.ablate import ablate
from jobs.stages import open_store
from pipeline.ablation import TABLE
from pipeline.stage import require
from schemas.errors import ConfigInvalid
from schemas.sweep import Sweep, load_sweep
from tests.jobs.test_trials import HERE, swept
from tests.pipeline.test_training import make_cache
from tests.processes import IN_A_SESSION

pytestmark = IN_A_SESSION


@pytest.fixture
def settings(settings: dict[str, Any]) -> dict[str, Any]:
    """A run that trains without Ray, and whose own evaluation is on workers."""
    return {**settings, "placement": {**HERE, "evaluate": {"workers": 1}}}


def table_of(sweep: Sweep) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(open_store(sweep.base).read(f"{sweep.ref}/{TABLE}"))
    return found


@pytest.mark.slow  # a session of 40 seconds; test_trials has the trials without one
def test_failed_trials_are_rows_and_a_rerun_trains_only_what_is_missing(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = swept(settings, tmp_path), io.StringIO()
    sweep = load_sweep(path)
    make_cache(sweep.base)

    def run(*overrides: str) -> int:
        console = Console(file=out, width=160)
        return ablate(path, overrides, console, dry_run=False, on="local", code="upload")

    assert run() == 1
    table = table_of(sweep)
    rows = {row["run"]: row for row in table["trials"]}
    states = {name: row["state"] for name, row in rows.items()}
    assert states == {
        "x-fine-s0@1": "done",
        "x-fine-s1@1": "done",
        "x-wild-s0@1": "failed",
        "x-wild-s1@1": "failed",
    }
    assert rows["x-wild-s0@1"]["error"].startswith("TrainingDiverged: ")
    assert "2 of 4 trials failed" in out.getvalue()
    fine, wild = table["arms"]
    kls = [rows[f"x-fine-s{seed}@1"]["figures"]["held_out_kl"] for seed in (0, 1)]
    assert kls[0] != kls[1], "seeds differ"
    assert (fine["n"], fine["figures"]["held_out_kl"]["mean"]) == (2, pytest.approx(sum(kls) / 2))
    assert wild["n"] == 0
    asked = require(open_store(sweep.base), sweep.trials[0].run.ref("evaluate"))
    assert "evaluate/tiny@1" in asked.identity["inputs"]

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("something was run")

    monkeypatch.setattr(jobs.ablate, "session", refused)
    monkeypatch.setattr(jobs.evaluate, "load_contestant", refused)
    monkeypatch.setattr(jobs.distill, "train_here", refused)
    assert run("skip=[{rate: wild}]") == 0
    assert table_of(sweep)["arms"] == [fine]
    with pytest.raises(AssertionError, match="something was run"):
        run()  # what failed is tried again


@pytest.mark.slow  # a session of half a minute for one message
def test_trial_that_no_node_holds_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    path = swept(settings, tmp_path, trial={"cpus": 9999})
    make_cache(load_sweep(path).base)
    with pytest.raises(ConfigInvalid, match=r"trial: 1 workers of 9999 CPU do not fit"):
        ablate(path, (), Console(file=io.StringIO()), dry_run=False, on="local", code="upload")
