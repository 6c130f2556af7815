"""Trackers of a training, with the modules of those that are not installed here played by others."""

import importlib.machinery
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from jobs.stages import resolved
from jobs.trackers import PACKAGES, Tracker, check_trackers, open_trackers
from schemas.config import RunConfig
from schemas.errors import ConfigInvalid

RunOf = Callable[..., RunConfig]
ALIGN = {"phase": 0, "kind": "align", "step": 4, "steps": 4, "loss": 2.5, "layer_0": 2.5, "lr": 1e-3}
DISTILL = {"phase": 1, "kind": "distill", "step": 2, "steps": 6, "loss": 0.5, "kl": 0.25, "lr": 1e-3}
Calls = list[tuple[str, Any]]


def module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    made.__dict__.update(members)
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What stand-ins for wandb and mlflow were called with, in order."""
    found: Calls = []

    def kept(name: str, gives: Any = None) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.append((name, (*args, kwargs)))
            return gives

        return call

    run = SimpleNamespace(log=kept("wandb.log"), finish=kept("wandb.finish"))
    started = SimpleNamespace(info=SimpleNamespace(run_id="r1"))
    members = {n: kept(f"mlflow.{n}") for n in ("log_params", "log_metrics", "end_run")}
    monkeypatch.setitem(sys.modules, "wandb", module("wandb", init=kept("wandb.init", run)))
    monkeypatch.setitem(sys.modules, "mlflow", module("mlflow", start_run=kept("mlflow.start_run", started), **members))
    return found


def scalars(folder: Path) -> Iterator[tuple[str, int, float]]:
    """(tag, step, value) of the folder's event files: records of length, its checksum, data, its checksum."""
    for path in folder.glob("events.*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            yield from ((v.tag, event.step, v.simple_value) for v in event.summary.value if v.HasField("simple_value"))


def test_tensorboard_holds_every_number_by_kind_of_phase_and_step_of_all_phases(run_of: RunOf, tmp_path: Path) -> None:
    with open_trackers(("tensorboard",), run_of(), tmp_path, pytest.fail) as trackers:
        trackers.log(ALIGN, 4)
        trackers.log(DISTILL, 6)
    assert {(tag, step) for tag, step, _ in scalars(tmp_path)} == {
        *((f"align/{name}", 4) for name in ("loss", "layer_0", "lr")),
        *((f"distill/{name}", 6) for name in ("loss", "kl", "lr")),
    }
    values = {tag: value for tag, _, value in scalars(tmp_path)}
    assert (values["align/loss"], values["distill/kl"]) == (2.5, 0.25)


def test_wandb_gets_the_artifact_as_name_the_run_as_config_and_the_numbers(
    run_of: RunOf, tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    run = run_of()
    with open_trackers(("wandb",), run, tmp_path, pytest.fail) as trackers:
        trackers.log(DISTILL, 6)
    init = {"project": "decant", "name": "distill/tiny@1", "config": resolved(run), "dir": str(tmp_path)}
    numbers = {"distill/loss": 0.5, "distill/kl": 0.25, "distill/lr": 1e-3}
    assert calls == [
        ("wandb.init", (init,)),
        ("wandb.log", (numbers, {"step": 6})),
        ("wandb.finish", ({"exit_code": 0},)),
    ]


def test_mlflow_gets_settings_by_dotted_name_and_numbers_by_the_runs_id(
    run_of: RunOf, tmp_path: Path, calls: Calls
) -> None:
    with open_trackers(("mlflow",), run_of(), tmp_path, pytest.fail) as trackers:
        trackers.log(ALIGN, 4)
    (start, (parameters, (settings, _)), metrics, end) = calls
    assert start == ("mlflow.start_run", ({"run_name": "distill/tiny@1"},))
    assert parameters == "mlflow.log_params"
    assert settings["distill.phases.1.kind"] == "distill"
    assert settings["cache.taps.fraction"] == 0.5
    numbers = {"align/loss": 2.5, "align/layer_0": 2.5, "align/lr": 1e-3}
    assert metrics == ("mlflow.log_metrics", (numbers, {"step": 4, "run_id": "r1"}))
    assert end == ("mlflow.end_run", ("FINISHED", {}))


def test_trackers_are_told_nothing_of_how_the_store_is_reached(run_of: RunOf, tmp_path: Path, calls: Calls) -> None:
    run = run_of(store={"url": "s3://bucket/decant", "endpoint": "https://inner:9000", "profile": "mine"})
    with open_trackers(("wandb", "mlflow", "tensorboard"), run, tmp_path, pytest.fail):
        pass
    written = b"".join(p.read_bytes() for p in tmp_path.glob("events.*"))
    for told in (str(calls), written.decode(errors="replace")):
        assert "s3://bucket/decant" in told
        assert "inner:9000" not in told
        assert "mine" not in told


def test_a_training_that_fails_is_a_failed_run(run_of: RunOf, tmp_path: Path, calls: Calls) -> None:
    with pytest.raises(RuntimeError, match="lost"), open_trackers(("wandb", "mlflow"), run_of(), tmp_path, pytest.fail):
        raise RuntimeError("lost")
    assert calls[-2:] == [("wandb.finish", ({"exit_code": 1},)), ("mlflow.end_run", ("FAILED", {}))]


@pytest.mark.parametrize(
    ("broken", "numbers_sent"), [("start_run", 0), ("log_params", 0), ("log_metrics", 0), ("end_run", 2)]
)
def test_a_tracker_that_fails_is_dropped_with_one_line_and_the_others_go_on(
    broken: str, numbers_sent: int, run_of: RunOf, tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError("no route to the server")

    monkeypatch.setattr(sys.modules["mlflow"], broken, fails)
    said: list[str] = []
    with open_trackers(("mlflow", "wandb"), run_of(), tmp_path, said.append) as trackers:
        trackers.log(ALIGN, 4)
        trackers.log(DISTILL, 6)
    assert said == ["mlflow is told nothing more: OSError: no route to the server"]
    assert [name for name, _ in calls].count("mlflow.log_metrics") == numbers_sent
    assert [name for name, _ in calls if name.startswith("wandb")] == [
        "wandb.init",
        "wandb.log",
        "wandb.log",
        "wandb.finish",
    ]


@pytest.mark.parametrize("name", list(PACKAGES))
def test_a_missing_package_is_refused_with_the_command_that_installs_it(
    name: Tracker, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_trackers(tuple(PACKAGES))
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(ConfigInvalid, match=f"trackers: {name} .*pip install {PACKAGES[name]}"):
        check_trackers(tuple(PACKAGES))
    assert calls == []
