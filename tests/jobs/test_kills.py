"""A stage whose processes are killed again and again: it ends, with what an uninterrupted run leaves."""

import io
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from jobs.inspect import verify_run
from jobs.stages import NAMES, run_named
from pipeline.shards import read_manifest
from pipeline.store import Store
from schemas.artifacts import RECORD
from schemas.config import RunConfig
from schemas.manifest import shard_name
from tests.conftest import tiny_settings
from tests.processes import OUTPUT, PATIENCE, running_in, started, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]
QUIET = Console(file=io.StringIO())
# What the workers of each stage that is killed call themselves.
WORKERS = {"cache": "TeacherActor", "prepare": "PrepareWorker"}
# What the other victims' command lines hold.
VICTIMS = {"driver": "-m jobs.cli", "raylet": "raylet/raylet", "control store": "gcs/gcs_server"}
ROUNDS = {
    "cache": {"driver": 9, "worker": 9, "raylet": 9, "control store": 3},
    "prepare": {"driver": 2, "worker": 2, "raylet": 2},
}
SAMPLES, SHARDS = 40, 10
# One kill in four comes while imports run, Ray starts or teachers load, the others after some shard.
EARLY = 0.25
# Seconds by which a kill comes later, at most: as long as a start takes; several times what a shard takes.
JITTER_EARLY, JITTER = 10.0, 0.1
# What has lost its raylet notices within seconds.
GRACE = 60.0
# Ray's agents look after the raylet that started them, and report its end to a control store that may be dead as well.
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
# For how many seconds Ray's processes look for a control store that is gone; a minute by default.
RAY = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}


@dataclass
class Rounds:
    """Stores in which all before a stage is finished, and the stage's command on them."""

    stage: str
    settings: dict[str, Any]
    folder: Path
    ray: Path

    def fresh(self) -> RunConfig:
        """A run whose stage has not begun."""
        store = Path(tempfile.mkdtemp(prefix="store-", dir=self.folder))
        shutil.copytree(self.settings["store"], store, dirs_exist_ok=True)
        return RunConfig.model_validate({**self.settings, "store": str(store)})

    @contextmanager
    def command(self, run: RunConfig) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
        """The stage's command, and the folder in which it and its session run."""
        folder = Path(tempfile.mkdtemp(prefix="round-", dir=self.folder))
        with started(self.stage, run.model_dump(mode="json"), folder, RAY_TMPDIR=str(self.ray), **RAY) as process:
            yield process, folder

    def finish(self, run: RunConfig) -> None:
        """Runs the stage to its end."""
        with self.command(run) as (process, folder):
            assert process.wait(PATIENCE) == 0, (folder / OUTPUT).read_text()

    def committed(self, run: RunConfig) -> int:
        """How many shards the stage has committed."""
        return len(list(Path(run.store.url, str(run.ref(self.stage))).glob("shard-*.parquet")))

    def finished(self, run: RunConfig) -> bool:
        """Whether the stage's record is written."""
        return Path(run.store.url, run.ref(self.stage).record_path).exists()

    def objects(self, run: RunConfig) -> dict[str, bytes]:
        """Everything of the artifact but the record, which has times."""
        store, ref = Store(run.store.url), run.ref(self.stage)
        return {name: store.read(f"{ref}/{name}") for name in store.names(str(ref)) if name != RECORD}


@pytest.fixture(params=WORKERS)
def rounds(request: pytest.FixtureRequest, tiny_teacher: Path, scenes_folder: Path, tmp_path: Path) -> Iterator[Rounds]:
    settings = tiny_settings(tiny_teacher, scenes_folder, tmp_path / "store")
    settings["placement"] = {
        "prepare": {"workers": int(request.param == "prepare")},
        "cache": {"cpus_per_worker": 0.75, "batch": 1, "decoders": 1},
    }
    Path(settings["store"]).mkdir()
    run = RunConfig.model_validate(settings)
    for name in NAMES[: NAMES.index(request.param)]:
        run_named(name, run, QUIET)
    # the paths of Ray's sockets must be short
    with tempfile.TemporaryDirectory(prefix="kills-", dir="/tmp") as ray:
        yield Rounds(request.param, settings, tmp_path, Path(ray))


def kill(rounds: Rounds, run: RunConfig, victim: str, chance: random.Random) -> bool:
    """One round: the command, a kill at a random moment, and the session's end; whether the kill came in time."""
    early, after = chance.random() < EARLY, chance.randrange(rounds.committed(run), SHARDS)
    jitter, began = chance.uniform(0, JITTER_EARLY if early else JITTER), time.monotonic()
    name = VICTIMS.get(victim, WORKERS[rounds.stage])
    with rounds.command(run) as (process, folder):
        came = wait_until(lambda: early or rounds.committed(run) > after, process, f"{after + 1} shards")
        came = came and wait_until(lambda: find(name, folder), process, victim)
        time.sleep(jitter)
        pid = find(name, folder)
        landed = came and pid is not None and not rounds.finished(run)
        if landed:
            os.kill(pid, signal.SIGKILL)
        status = process.wait(PATIENCE)  # a command that hangs fails here
        output = (folder / OUTPUT).read_text()
        assert rounds.finished(run) == (status == 0), output
        assert status == -signal.SIGKILL or not (landed and victim == "driver")
        assert_the_end(folder)
    when, seconds = f"{jitter:.1f} s after {'its start' if early else f'shard {after}'}", time.monotonic() - began
    last = output.strip().splitlines()[-1:]
    print(f"{victim}, {when}: {landed=}, {status=}, {rounds.committed(run)} shards, {seconds:.0f} s, {last}")
    return landed


def find(name: str, folder: Path) -> int | None:
    """The id of the process with such a command line, None while there is none."""
    return next((pid for pid, line in running_in(folder).items() if name in line), None)


def assert_the_end(folder: Path) -> None:
    """No process of the session survives that could work; its agents hold nothing and are not waited for."""
    deadline = time.monotonic() + GRACE
    while working := {p: n for p, n in running_in(folder).items() if not n.startswith(AGENTS)}:
        assert time.monotonic() < deadline, f"still there: {working}"
        time.sleep(0.05)


def assert_whole(rounds: Rounds, run: RunConfig, expected: dict[str, bytes]) -> None:
    """The artifact holds every sample once and is, to the byte, what an uninterrupted run leaves."""
    assert rounds.objects(run) == expected
    store, ref, source = Store(run.store.url), run.ref(rounds.stage), run.ref("prepare")
    names = [shard.name for shard in read_manifest(store, ref).shards]
    ids, wanted = ([i for name in names for i in sample_ids(store.path(f"{r}/{name}"))] for r in (ref, source))
    assert ids == wanted
    assert len(ids) == len(set(ids)) == SAMPLES
    verify_run(run, QUIET, repair=False)


def sample_ids(path: str) -> list[str]:
    found: list[str] = pq.read_table(path)["sample_id"].to_pylist()
    return found


def test_stage_whose_processes_are_killed_at_random_ends_with_the_bytes_of_an_uninterrupted_run(
    rounds: Rounds,
) -> None:
    whole = rounds.fresh()
    rounds.finish(whole)
    expected = rounds.objects(whole)
    assert {shard_name(index) for index in range(SHARDS)} <= expected.keys()
    chance, landed, artifacts = random.Random(0), Counter[str](), 1
    victims = [victim for victim, count in ROUNDS[rounds.stage].items() for _ in range(count)]
    chance.shuffle(victims)
    run = rounds.fresh()
    while victims:
        if kill(rounds, run, victims[-1], chance):
            landed[victims.pop()] += 1
        if rounds.committed(run) == SHARDS and not rounds.finished(run):  # nothing left to kill, only a record to write
            rounds.finish(run)
        if rounds.finished(run):
            assert_whole(rounds, run, expected)
            run, artifacts = rounds.fresh(), artifacts + 1
    rounds.finish(run)
    assert_whole(rounds, run, expected)
    print(f"kills that landed: {dict(landed)}, over {artifacts} artifacts")
    assert landed == ROUNDS[rounds.stage]
