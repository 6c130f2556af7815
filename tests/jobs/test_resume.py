"""``decant distill`` whose processes are killed again and again: it ends as an uninterrupted run does."""

import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.numpy import load

from jobs.train import WEIGHTS
from pipeline.store import Store
from schemas.artifacts import CHECKPOINTS
from schemas.config import RunConfig
from tests.conftest import tiny_settings
from tests.jobs.test_kills import RAY, assert_the_end
from tests.pipeline.test_training import curve_of, make_cache
from tests.processes import OUTPUT, PATIENCE, running_in, started, wait_until
from tests.tolerances import ENGINE_CURVE

pytestmark = [pytest.mark.ray, pytest.mark.slow]
# What the victims' command lines hold; `everything` is all of the session at once.
VICTIMS = {
    "driver": "-m jobs.cli",
    "controller": "TrainController",
    "worker": "RayTrainWorker",
    "raylet": "raylet/raylet",
}
ROUNDS = {"driver": 1, "controller": 1, "worker": 1, "raylet": 1, "everything": 1}
# Steps enough for a kill to fall among them.
PHASES = [
    {"kind": "align", "steps": 60, "batch": 4, "lr": 1e-3},
    {"kind": "distill", "steps": 120, "batch": 4, "lr": 1e-3, "decay_steps": 60},
]
EVERY = 10


def run_of(settings: dict[str, Any], store: Path, workers: int) -> RunConfig:
    place = {
        "prepare": {"workers": 0},
        "cache": {"cpus_per_worker": 0.75, "decoders": 1},
        "distill": {"workers": workers},
    }
    section = {"phases": PHASES, "checkpoint_every": EVERY}
    return RunConfig.model_validate({**settings, "store": str(store), "placement": place, "distill": section})


def found(name: str, folder: Path) -> list[int]:
    """The session's processes with such a command line; a worker has left the folder, but not its raylet."""
    every = running_in(folder)
    for pid in list(every):
        try:
            children = psutil.Process(pid).children(recursive=True)
            every |= {child.pid: " ".join(child.cmdline()) for child in children}
        except psutil.Error:
            continue  # it has just ended
    return [pid for pid, line in every.items() if name in line]


def kill(run: RunConfig, folder: Path, victim: str, chance: random.Random, ray: Path) -> bool:
    """One command and one kill, after some checkpoint that was not there before; whether it came in time."""
    checkpoints = Path(run.store.url, str(run.ref("distill")), CHECKPOINTS)
    before = {p.name for p in checkpoints.glob("*")}
    new, jitter = chance.randrange(4), chance.uniform(0, 0.5)
    where = Path(tempfile.mkdtemp(prefix="round-", dir=folder))
    names = list(VICTIMS.values()) if victim == "everything" else [VICTIMS[victim]]
    seen = set(before)

    def advanced() -> bool:
        seen.update(p.name for p in checkpoints.glob("*"))
        return len(seen - before) > new

    with started("distill", run.model_dump(mode="json"), where, RAY_TMPDIR=str(ray), **RAY) as process:
        came = wait_until(advanced, process, "a checkpoint")
        time.sleep(jitter)
        pids = [pid for name in names for pid in found(name, where)]
        landed = came and bool(pids) and process.poll() is None
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                landed = landed and victim == "everything"
        status = process.wait(PATIENCE)
        if victim != "worker":
            assert_the_end(where)
    print(f"{victim}: {landed=}, {status=}, {len(seen - before)} checkpoints seen", flush=True)
    return landed


@pytest.fixture
def base(tiny_teacher: Path, scenes_folder: Path, tmp_path: Path) -> dict[str, Any]:
    settings = tiny_settings(tiny_teacher, scenes_folder, tmp_path / "base")
    make_cache(run_of(settings, tmp_path / "base", 1))
    return settings


@pytest.fixture
def ray() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kills-", dir="/tmp") as folder:
        yield Path(folder)


def fresh(settings: dict[str, Any], folder: Path, workers: int) -> RunConfig:
    store = Path(tempfile.mkdtemp(prefix="store-", dir=folder))
    shutil.copytree(settings["store"], store, dirs_exist_ok=True)
    return run_of(settings, store, workers)


def finish(run: RunConfig, folder: Path, ray: Path) -> None:
    where = Path(tempfile.mkdtemp(prefix="finish-", dir=folder))
    with started("distill", run.model_dump(mode="json"), where, RAY_TMPDIR=str(ray), **RAY) as process:
        assert process.wait(PATIENCE) == 0, (where / OUTPUT).read_text()


def weights(run: RunConfig) -> dict[str, Any]:
    return dict(load(Store(run.store.url).read(f"{run.ref('distill')}/{WEIGHTS}")))


def test_training_whose_processes_are_killed_at_random_ends_as_an_uninterrupted_one(
    base: dict[str, Any], tmp_path: Path, ray: Path
) -> None:
    whole = fresh(base, tmp_path, 1)
    finish(whole, tmp_path, ray)
    expected, curve = weights(whole), curve_of(whole)
    chance, landed, artifacts = random.Random(0), Counter[str](), 0
    victims = [victim for victim, count in ROUNDS.items() for _ in range(count)]
    chance.shuffle(victims)
    run = fresh(base, tmp_path, 1)
    while victims or artifacts == 0:
        if victims and kill(run, tmp_path, victims[-1], chance, ray):
            landed[victims.pop()] += 1
        if not victims:
            finish(run, tmp_path, ray)
        if Path(run.store.url, run.ref("distill").record_path).exists():
            found_now = weights(run)
            assert all((found_now[name] == value).all() for name, value in expected.items())
            assert curve_of(run) == curve
            run, artifacts = fresh(base, tmp_path, 1), artifacts + 1
    print(f"kills that landed: {dict(landed)}, over {artifacts} artifacts")
    assert landed == ROUNDS


def test_training_that_goes_on_with_more_workers_sees_the_same_samples(
    base: dict[str, Any], tmp_path: Path, ray: Path
) -> None:
    whole = fresh(base, tmp_path, 1)
    finish(whole, tmp_path, ray)
    chance, run = random.Random(1), fresh(base, tmp_path, 1)
    assert kill(run, tmp_path, "driver", chance, ray)
    finish(run_of(base, Path(run.store.url), 2), tmp_path, ray)
    for one, two in zip(curve_of(whole), curve_of(run), strict=True):
        assert (one["done"], one["lr"]) == (two["done"], two["lr"])
        # a step of other samples would be off by far more
        assert one["loss"] == pytest.approx(two["loss"], rel=10 * ENGINE_CURVE)
