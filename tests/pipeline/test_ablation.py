"""A sweep's table: means and intervals over seeds, differences of arms, and what is folded from records."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.ablation import TABLE, fold, paired, student_t, summary, write_table
from pipeline.stage import Stage, run_stage
from pipeline.store import Store
from schemas.errors import ConfigInvalid, TrainingDiverged
from schemas.sweep import Sweep, load_sweep
from tests.tolerances import FLOAT64

DEMO = Path("jobs/configs/demo.yaml").absolute()
KL, CE = {"losses": "kl"}, {"losses": "ce"}


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    axes = {"losses": {"kl": {"distill.clip": 1.0}, "ce": {"distill.clip": 2.0}}}
    settings = {"name": "x", "run": str(DEMO), "axes": axes, "set": {"store": str(tmp_path / "store")}}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return load_sweep(path)


# Of the central 95 %, as tables print it.
@pytest.mark.parametrize(("freedom", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042)])
def test_students_t_is_that_of_the_tables(freedom: int, t: float) -> None:
    assert student_t(freedom) == pytest.approx(t, abs=5e-4)


def test_interval_is_the_mean_and_t_standard_errors_on_either_side() -> None:
    found = summary([1.0, 2.0, 6.0])
    assert found["mean"] == 3
    assert found["sd"] == pytest.approx(math.sqrt(7), abs=FLOAT64)
    half = student_t(2) * math.sqrt(7 / 3)
    assert found["ci95"] == pytest.approx([3 - half, 3 + half], abs=FLOAT64)
    assert summary([2.0]) == {"mean": 2.0, "sd": None, "ci95": None}


def finish(store: Store, sweep: Sweep, number: int, value: float, **more: Any) -> None:
    """Records as the stages leave them, with such figures."""
    run = sweep.trials[number].run
    student = {"exact_match": {"overall": {"value": value}}, "held_out_kl": 1 - value, **more.pop("student", {})}
    results: dict[str, Any] = {
        "distill": {"last": {"loss": 3.0, "kl": 2.0, "layer_0": 0.25, "layer_4": 0.75}},
        "evaluate": {"student": student, "recovery": value / 0.5, **more},
    }
    for stage, result in results.items():
        run_stage(store, Stage(run.ref(stage), (), {}, lambda *_, result=result: result))


def fail(store: Store, sweep: Sweep, number: int) -> None:
    def diverge(*_: object) -> dict[str, Any]:
        raise TrainingDiverged("step 3: the loss is nan")

    with pytest.raises(TrainingDiverged):
        run_stage(store, Stage(sweep.trials[number].run.ref("distill"), (), {}, diverge))


def test_table_says_of_each_trial_what_is_on_disk(sweep: Sweep, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    assert {row["state"] for row in fold(store, sweep, {})["trials"]} == {"pending"}
    finish(store, sweep, 0, 0.25)
    finish(store, sweep, 2, 0.5)
    fail(store, sweep, 3)
    table = fold(store, sweep, {"x-ce-s1": "WorkerCrashedError: killed"})
    assert [row["state"] for row in table["trials"]] == ["done", "pending", "done", "failed", "failed", "pending"]
    done, diverged, lost = (table["trials"][i] for i in (0, 3, 4))
    assert (done["settings"], done["seed"], done["run"], done["error"]) == (KL, 0, "x-kl-s0@1", None)
    assert done["seconds"] >= 0
    assert done["figures"] == {
        "exact_match": 0.25,
        "recovery": 0.5,
        "held_out_kl": 0.75,
        "final_kl": 2.0,
        "final_layer": 0.5,
    }
    assert (diverged["error"], diverged["figures"]) == ("TrainingDiverged: step 3: the loss is nan", {})
    assert lost["error"] == "WorkerCrashedError: killed"
    assert table["figures"]["held_out_kl"] == {"better": "lower", "unit": "nats"}
    assert table["axes"] == {"losses": ["kl", "ce"]}
    kl, ce = table["arms"]
    assert (kl["settings"], kl["n"], kl["figures"]["exact_match"]) == (KL, 2, summary([0.25, 0.5]))
    assert (ce["settings"], ce["n"], ce["figures"]) == (CE, 0, {})
    assert json.loads(Path(write_table(store, sweep, table)).read_text()) == table
    assert store.names(str(sweep.ref)) == [TABLE]


def test_benchmarks_headlines_and_what_is_not_measured(sweep: Sweep, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    tasks = {
        "pope": {"accuracy": {"value": 0.75, "scale": 1.0}, "yes": {"value": 0.5, "scale": 1.0}},
        "mme": {"perception": {"value": 1400.0, "scale": 2000.0}},
        "mm-vet": {},
    }
    shared = {"top1_agreement": {"value": 0.9}, "ece": 0.125}
    finish(store, sweep, 0, 0.25, student={"tasks": tasks}, distribution=shared)
    finish(store, sweep, 1, 0.25, recovery=None)
    table = fold(store, sweep, {})
    first, second = (row["figures"] for row in table["trials"][:2])
    wanted = {"pope accuracy": 0.75, "mme perception": 1400.0, "top1_agreement": 0.9, "ece": 0.125}
    assert {name: first[name] for name in wanted} == wanted
    assert "pope yes" not in first
    assert second.keys() == {"exact_match", "held_out_kl", "final_kl", "final_layer"}
    assert table["figures"]["mme perception"] == {"better": "higher", "unit": "of 2000"}
    assert table["figures"]["pope accuracy"] == {"better": "higher", "unit": "share"}


def test_paired_difference_goes_seed_by_seed(sweep: Sweep, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    for number, value in enumerate([0.5, 0.75, 1.0, 0.375, 0.75]):  # the last seed of the second arm is missing
        finish(store, sweep, number, value)
    table = fold(store, sweep, {})
    found = paired(table, "exact_match", KL, CE)
    assert (found.mean, found.seeds) == (0.0625, (0, 1))
    expected = summary([0.125, 0.0])
    assert (found.sd, list(found.ci95 or ())) == (expected["sd"], expected["ci95"])
    assert paired(table, "exact_match", CE, KL).mean == -found.mean
    with pytest.raises(ConfigInvalid, match="losses kl and losses ce have no finished seed in common with pope"):
        paired(table, "pope", KL, CE)
