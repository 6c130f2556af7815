from pathlib import Path
from typing import Any

import pytest
import yaml

from schemas.config import StoreConfig
from schemas.errors import ConfigInvalid
from schemas.runfile import load_run
from schemas.sweep import Sweep, load_sweep, room_of

DEMO = Path("jobs/configs/demo.yaml").absolute()
SHIPPED = Path("jobs/configs/sweeps")
AXES = {
    "init": {"mimic": {"student.init": "mimic"}, "random": {"student.init": "random"}},
    "losses": {
        "kl": {"distill.phases.1.weights": {"kl": 1, "layer": 0}},
        "ce": {"distill.phases.1.weights": {"kl": 0, "layer": 0, "ce": 1}},
    },
}


def written(folder: Path, **fields: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(
        yaml.safe_dump({"name": "x", "run": str(DEMO), "seeds": [0, 7], "axes": AXES, **fields}, sort_keys=False)
    )
    return path


def names(sweep: Sweep) -> list[str]:
    return [trial.name for trial in sweep.trials]


def test_trials_are_the_product_of_axes_and_seeds_under_names_that_say_so(tmp_path: Path) -> None:
    sweep = load_sweep(written(tmp_path))
    arms = ["mimic-kl", "mimic-ce", "random-kl", "random-ce"]
    assert names(sweep) == [f"x-{arm}-s{seed}" for arm in arms for seed in (0, 7)]
    trial = sweep.trials[-1]
    assert (trial.settings, trial.seed) == ({"init": "random", "losses": "ce"}, 7)
    assert (trial.run.student.init, trial.run.distill.phases[1].weights.ce, trial.run.distill.seed) == ("random", 1, 7)  # type: ignore[union-attr]
    assert {str(trial.run.ref(stage)) for stage in ("prepare", "cache")} == {"prepare/demo@1", "cache/demo@1"}
    assert str(trial.run.ref("evaluate")) == "evaluate/x-random-ce-s7@1"
    assert trial.run.evaluate.teacher == "demo@1"
    assert sweep.base == load_run(DEMO)


def test_arms_leave_some_combinations_and_skip_leaves_some_out(tmp_path: Path) -> None:
    chosen = written(tmp_path, arms=[{"init": "random", "losses": "ce"}, {"init": "mimic"}], seeds=[0])
    assert names(load_sweep(chosen)) == ["x-mimic-kl-s0", "x-mimic-ce-s0", "x-random-ce-s0"]
    skipped = written(tmp_path, skip=[{"losses": "kl"}], seeds=[0])
    assert names(load_sweep(skipped)) == ["x-mimic-ce-s0", "x-random-ce-s0"]


def test_base_file_is_beside_the_sweep_and_set_is_for_base_and_trials(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(DEMO.read_text())
    path = written(tmp_path, run="base.yaml", set={"cache.taps.layers": "all", "cache.artifact": "taps@1"})
    sweep = load_sweep(path)
    for run in (sweep.base, *(trial.run for trial in sweep.trials)):
        assert (run.cache.taps.layers, str(run.ref("cache"))) == ("all", "cache/taps@1")


def test_override_is_of_the_sweep_or_else_of_its_base_run(tmp_path: Path) -> None:
    sweep = load_sweep(written(tmp_path), ["seeds=[3]", "trial.gpus=0.25", "distill.clip=0.5", "evaluate.limit=9"])
    assert [trial.seed for trial in sweep.trials] == [3] * 4
    assert sweep.config.trial.gpus == 0.25
    for run in (sweep.base, sweep.trials[0].run):
        assert (run.distill.clip, run.evaluate.limit) == (0.5, 9)


def test_axes_may_refine_what_an_earlier_one_sets(tmp_path: Path) -> None:
    phases = [{"kind": "distill", "steps": 5}]
    axes = {"recipe": {"short": {"distill.phases": phases}}, "lr": {"low": {"distill.phases.0.lr": 1e-9}}}
    (trial,) = load_sweep(written(tmp_path, axes=axes, seeds=[0])).trials
    assert [(phase.steps, phase.lr) for phase in trial.run.distill.phases] == [(5, 1e-9)]


def test_trial_runs_in_its_own_process_with_what_the_sweep_gives_it(tmp_path: Path) -> None:
    zero = {"placement.distill.strategy": "zero2", "placement.distill.offload": True}
    trial = {"cpus": 1.5, "gpus": 0.5, "memory": 4}
    placement = load_sweep(written(tmp_path, set=zero, trial=trial)).trials[0].run.placement
    for place in (placement.distill, placement.evaluate):
        amounts = (place.workers, place.cpus_per_worker, place.gpus_per_worker, place.memory_per_worker)
        assert amounts == (0, 1.5, 0.5, 4.0)
    assert (placement.distill.strategy, placement.distill.offload, placement.distill.min_workers) == (
        "ddp",
        False,
        None,
    )
    assert placement.device == "auto"
    run = load_sweep(written(tmp_path)).trials[0].run
    assert run.placement.device == "cpu", "a trial without a GPU of its own leaves it to others"
    assert (room_of(run).workers, room_of(run).labels) == (1, {"pool": "student"})


def one(key: str, value: Any = 1) -> dict[str, Any]:
    return {"axes": {"a": {"one": {key: value}}}}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (one("cache.seed"), "a: cache.seed: all trials of a sweep have one cache"),
        (one("prepare.max_length"), "a: prepare.max_length: all trials of a sweep have one cache"),
        (one("teacher.path"), "a: teacher.path: all trials of a sweep have one cache"),
        (one("distill.seed"), "distill.seed: comes from `seeds`"),
        (one("distill.artifact", "y@1"), "distill.artifact: trials differ in settings of `student` and `distill`"),
        (one("evaluate.limit"), "evaluate.limit: trials differ in settings of `student` and `distill`"),
        (one("distill"), "a: distill: trials differ in settings"),
        (one("student.innit", "mimic"), "a one: student.innit: unknown field"),
        (one("distill.phases.9.lr"), "axes.a.one.distill.phases.9.lr: `9` is not an index from 0 to 1"),
        (one("student.init.x"), "axes.a.one.student.init.x: `init` holds the value 'mimic'"),
        ({"axes": {"a": {}}}, "a: has no values"),
        ({"axes": {"a": {"one-two": {}}}}, "a: 'one-two' is no name here"),
        ({"axes": {"a": {"x": {"student.init": "random"}}, "b": {"y": {"student.init": "mimic"}}}}, "as axis a does"),
        ({"arms": [{"init": "mimik"}]}, "arms.0: init: mimik: no such axis or value; there are mimic, random"),
        ({"skip": [{"start": "mimic"}]}, "skip.0: start: mimic: no such axis or value; there are init, losses"),
        ({"skip": [{}]}, "skip: leaves no combination"),
        ({"seeds": [1, 1]}, "seeds are distinct"),
        ({"seeds": []}, "seeds"),
        ({"trial": {"gpus": 2}}, "trial.gpus"),
        ({"trials": {}}, "trials: unknown field; did you mean `trial`?"),
        ({"set": {"storre": "x"}}, "storre: unknown field"),
        ({"run": "nowhere.yaml"}, "nowhere.yaml: no such run file"),
    ],
)
def test_wrong_sweep_is_refused_by_field(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        load_sweep(written(tmp_path, **fields))
    assert says in str(caught.value)


def test_sweep_that_travels_is_the_same_sweep(tmp_path: Path) -> None:
    sweep = load_sweep(written(tmp_path, skip=[{"losses": "ce"}]), ["seeds=[4]", "distill.clip=0.5"])
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(sweep.base.model_dump(mode="json")))
    (tmp_path / "there.yaml").write_text(sweep.as_yaml("run.yaml"))
    again = load_sweep(tmp_path / "there.yaml")
    assert (again.base, again.trials) == (sweep.base, sweep.trials)
    moved = sweep.at(StoreConfig(url="s3://bucket/x"))
    assert {run.store.url for run in (moved.base, *(t.run for t in moved.trials))} == {"s3://bucket/x"}


def test_every_shipped_sweep_is_valid_and_has_three_seeds() -> None:
    sweeps = {path.stem: load_sweep(path) for path in sorted(SHIPPED.glob("*.yaml")) if path.stem != "base"}
    assert {name: len(list(sweep.arms())) for name, sweep in sweeps.items()} == {
        "init": 6,
        "losses": 6,
        "placement": 8,
        "ratio": 8,
    }
    assert all(sweep.config.name == name and len(sweep.config.seeds) == 3 for name, sweep in sweeps.items())
    single = [t.run.distill.phases for t in sweeps["losses"].arms() if t.settings["losses"] != "decant"]
    assert {(len(p), p[0].steps, p[0].batch, p[0].lr) for p in single} == {(1, 120, 32, 1e-3)}
