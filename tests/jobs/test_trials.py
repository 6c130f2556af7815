"""Trials of a sweep in this process: trained without workers, evaluated with the answers that the teacher gave once."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

import jobs.ablate
import jobs.distill
import jobs.evaluate
import pipeline.training.loop
from jobs.ablate import ablate, check_trials
from jobs.stages import load_stage, open_store
from jobs.train import INITIAL, WEIGHTS, train_job, train_student
from pipeline.stage import require, run_stage
from pipeline.teacher_answers import HIDDEN, PREDICTIONS
from pipeline.training.engine import Worker
from schemas.artifacts import CHECKPOINTS, RECORD
from schemas.config import RunConfig
from schemas.errors import ArtifactDrift, ArtifactMissing, ConfigInvalid
from schemas.sweep import load_sweep
from tests.pipeline.test_training import curve_of, make_cache

RunOf = Callable[..., RunConfig]
HERE = {"prepare": {"workers": 0}, "distill": {"workers": 0}, "evaluate": {"workers": 0}}
# A step of such a size leaves no finite loss.
RATES = {"fine": {"distill.phases.0.lr": 1e-3}, "wild": {"distill.phases.0.lr": 1e30}}


@pytest.fixture
def settings(settings: dict[str, Any]) -> dict[str, Any]:
    """A run of which no stage but `cache` needs Ray."""
    return {**settings, "placement": HERE, "evaluate": {**settings["evaluate"], "limit": 6}}


@pytest.fixture
def no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray must not be started."""

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a session was started")

    for module in (jobs.ablate, jobs.distill, jobs.evaluate):
        monkeypatch.setattr(module, "session", refused)


def swept(settings: dict[str, Any], folder: Path, **fields: Any) -> Path:
    """A sweep file over the settings' run."""
    (folder / "base.yaml").write_text(yaml.safe_dump(settings))
    path = folder / "sweep.yaml"
    given = {"name": "x", "run": "base.yaml", "seeds": [0, 1], "axes": {"rate": RATES}, **fields}
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    return path


def finish(run: RunConfig, *stages: str) -> None:
    for name in stages:
        run_stage(open_store(run), load_stage(name, run))


def files(run: RunConfig, stage: str, *names: str) -> list[bytes]:
    return [open_store(run).read(f"{run.ref(stage)}/{name}") for name in names]


def renamed(run: RunConfig, name: str, **evaluate: Any) -> RunConfig:
    """The same run under another name, on the same samples and cache."""
    given = run.model_dump(mode="json")
    for stage in ("prepare", "cache", "distill"):
        given[stage]["artifact"] = str(run.ref(stage)).partition("/")[2]
    given["evaluate"] |= {"artifact": name, **evaluate}
    return RunConfig.model_validate(given)


def test_training_without_workers_is_that_of_one_worker_in_this_process(run_of: RunOf, no_session: None) -> None:
    run, other = run_of(), run_of(distill={**run_of().distill.model_dump(mode="json"), "artifact": "other@1"})
    make_cache(run)
    finish(run, "distill")
    torch.set_num_threads(1)
    train_student(train_job(other, "f" * 32), Worker(0, 1, torch.device("cpu")), lambda _: None)
    assert files(run, "distill", WEIGHTS, INITIAL) == files(other, "distill", WEIGHTS, INITIAL)
    assert curve_of(run) == curve_of(other)
    result = require(open_store(run), run.ref("distill")).result
    assert (result["steps"], result["workers"], result["restarts"], result["backend"]) == (10, 1, 0, "torch")


def test_no_workers_cannot_shard(run_of: RunOf) -> None:
    with pytest.raises(ValueError, match="workers: 0 is this process alone, and strategy zero2 needs a group"):
        run_of(placement={"distill": {"workers": 0, "strategy": "zero2"}})


class Killed(BaseException):
    """As a kill ends a process: nothing that handles errors sees it."""


def test_killed_trial_goes_on_from_its_checkpoint_to_the_same_weights(
    settings: dict[str, Any], tmp_path: Path, no_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = load_sweep(swept(settings, tmp_path, skip=[{"rate": "wild"}]))
    make_cache(sweep.base)
    killed, whole = (trial.run for trial in sweep.trials)
    whole = whole.model_copy(update={"distill": whole.distill.model_copy(update={"seed": killed.distill.seed})})
    really, steps = pipeline.training.loop.learning_rate, []

    def rate(schedule: Any, step: int) -> float:
        steps.append(step)
        if len(steps) == 12:  # each step asks once, and each logged one once more
            raise Killed
        return really(schedule, step)

    monkeypatch.setattr(pipeline.training.loop, "learning_rate", rate)
    with pytest.raises(Killed):
        finish(killed, "distill")
    folder = Path(killed.store.url) / str(killed.ref("distill"))
    assert not (folder / RECORD).exists()
    left = sorted(path.name for path in (folder / CHECKPOINTS).iterdir())
    assert left, "it was killed after a checkpoint"
    begun = len(steps)
    finish(killed, "distill")
    resumed = len(steps) - begun
    finish(whole, "distill")
    assert resumed < len(steps) - begun - resumed, "steps before the checkpoint are not made again"
    assert files(killed, "distill", WEIGHTS) == files(whole, "distill", WEIGHTS)
    assert curve_of(killed) == curve_of(whole)


@pytest.fixture
def evaluated(run_of: RunOf, no_session: None) -> RunConfig:
    """A run with a finished evaluation, of its own teacher's answers."""
    run = run_of()
    make_cache(run)
    finish(run, "distill", "evaluate")
    return run


def test_taken_answers_of_the_teacher_give_the_evaluation_that_asking_gives(
    evaluated: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = jobs.evaluate.load_contestant

    def load(job: Any, who: Any, attention: Any) -> Any:
        assert who != "teacher", "the teacher was asked"
        return really(job, who, attention)

    monkeypatch.setattr(jobs.evaluate, "load_contestant", load)
    taking = renamed(evaluated, "taking@1", teacher="tiny@1")
    finish(taking, "evaluate")
    own, taken = (require(open_store(run), run.ref("evaluate")) for run in (evaluated, taking))
    assert taken.result == own.result
    assert files(taking, "evaluate", PREDICTIONS) == files(evaluated, "evaluate", PREDICTIONS)
    assert taken.identity["inputs"] == {**own.identity["inputs"], "evaluate/tiny@1": own.fingerprint}
    assert HIDDEN in own.files
    assert HIDDEN not in taken.files


def test_answers_of_another_evaluation_are_refused(evaluated: RunConfig, tmp_path: Path) -> None:
    def refused(error: type[Exception], says: str, **evaluate: Any) -> None:
        with pytest.raises(error, match=says):
            finish(renamed(evaluated, "other@1", **evaluate), "evaluate")
        open_store(evaluated).remove("evaluate/other@1")

    refused(ArtifactMissing, r"evaluate/none@1: does not exist", teacher="none@1")
    refused(ConfigInvalid, "other@1 is this run's own evaluation", teacher="other@1")
    refused(ArtifactDrift, "limit: 6 -> 3", teacher="tiny@1", limit=3)
    refused(ArtifactDrift, "max_new_tokens: 16 -> 2", teacher="tiny@1", max_new_tokens=2)
    finish(renamed(evaluated, "second@1", teacher="tiny@1", untrained=False), "evaluate")
    says = r"second@1: keeps no answers of the teacher \(it took them from evaluate/tiny@1, which can be named here\)"
    refused(ConfigInvalid, says, teacher="second@1")
    # where images are is no setting of the evaluation, but what they show is in the questions' digests
    images = tmp_path / "others"
    shutil.copytree(evaluated.evaluate.images, images)
    shutil.copy(images / "images/test/000000.png", images / "images/test/000003.png")
    refused(ArtifactDrift, "1 of 6 questions are encoded otherwise .* place 3", teacher="tiny@1", images=str(images))


def test_arms_that_the_cache_does_not_serve_are_refused_with_what_to_set(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    layers = {"layers": {"first": {"student.layers.list": [0], "student.layers.ratio": None}}}
    layers["layers"]["last"] = {"student.layers.list": [3], "student.layers.ratio": None}
    path = swept(settings, tmp_path, axes=layers)
    says = r"sweep x: layers last: replaces layers \[3\], but the base run's cache taps {}; .*taps\.layers to `all`"
    with pytest.raises(ConfigInvalid, match=says.format(r"\[0\]")):
        check_trials(load_sweep(path))
    with pytest.raises(ConfigInvalid, match=says.format(r"\[0, 1\]")):
        check_trials(load_sweep(path, ["cache.taps.layers=[0, 1]"]))
    with pytest.raises(ConfigInvalid, match=r"sweep x: layers first: cache\.taps: the recipe has a layer loss"):
        check_trials(load_sweep(path, ["cache.taps.fraction=0"]))
    check_trials(load_sweep(path, ["cache.taps.layers=all"]))


def test_dry_run_lists_the_trials_and_writes_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    out = io.StringIO()
    path = swept(settings, tmp_path, trial={"cpus": 0.5})
    assert ablate(path, (), Console(file=out, width=120), dry_run=True, on="local", code="upload") == 0
    text = out.getvalue()
    for name in ("cache/tiny@1 would be made", "x-fine-s0", "x-wild-s1", "would run", "4 trials, each with 0.5 CPU"):
        assert name in text
    assert not Path(settings["store"]).exists()
