"""A stage whose processes are killed again and again: it ends, with what an uninterrupted run leaves."""

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

from jobs import prepare
from pipeline.shards import read_manifest
from pipeline.stage import run_stage
from pipeline.store import Store
from pipeline.verify import targets_check, verify
from schemas.artifacts import RECORD
from schemas.config import RunConfig
from schemas.manifest import shard_name
from schemas.tables import targets_table
from tests.conftest import tiny_settings
from tests.processes import OUTPUT, PATIENCE, running_in, started, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]
# What the victims call themselves; the driver is the process that was started, the actor's name ends with its class.
VICTIMS = {
    "driver": "-m jobs.cli",
    "actor": "TeacherActor",
    "raylet": "raylet/raylet",
    "control store": "gcs/gcs_server",
}
ROUNDS = {"driver": 9, "actor": 9, "raylet": 9, "control store": 3}
STAGE, SHARDS = "cache", 10
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
    """Stores that begin with a finished `prepare` each, and the stage's command on them."""

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
        with started(STAGE, run.model_dump(mode="json"), folder, RAY_TMPDIR=str(self.ray), **RAY) as process:
            yield process, folder

    def finish(self, run: RunConfig) -> None:
        """Runs the stage to its end."""
        with self.command(run) as (process, folder):
            assert process.wait(PATIENCE) == 0, (folder / OUTPUT).read_text()


@pytest.fixture
def rounds(tiny_teacher: Path, scenes_folder: Path, tmp_path: Path) -> Iterator[Rounds]:
    settings = tiny_settings(tiny_teacher, scenes_folder, tmp_path / "store")
    settings["placement"] = {"prepare": {"workers": 0}, "cache": {"cpus_per_worker": 0.75, "batch": 1, "decoders": 1}}
    run = RunConfig.model_validate(settings)
    run_stage(Store(run.store.url), prepare.stage(run))
    # the paths of Ray's sockets must be short
    with tempfile.TemporaryDirectory(prefix="kills-", dir="/tmp") as ray:
        yield Rounds(settings, tmp_path, Path(ray))


def artifact(run: RunConfig) -> Path:
    return Path(run.store.url) / str(run.ref(STAGE))


def finished(run: RunConfig) -> bool:
    return Path(run.store.url, run.ref(STAGE).record_path).exists()


def committed(run: RunConfig) -> int:
    return len(list(artifact(run).glob("shard-*.parquet")))


def find(victim: str, folder: Path) -> int | None:
    """The victim's process id, None while there is none."""
    return next((pid for pid, name in running_in(folder).items() if VICTIMS[victim] in name), None)


def kill(rounds: Rounds, run: RunConfig, victim: str, chance: random.Random) -> bool:
    """One round: the command, a kill at a random moment, and the session's end; whether the kill came in time."""
    early, after = chance.random() < EARLY, chance.randrange(committed(run), SHARDS)
    jitter, began = chance.uniform(0, JITTER_EARLY if early else JITTER), time.monotonic()
    with rounds.command(run) as (process, folder):
        came = wait_until(lambda: early or committed(run) > after, process, f"{after + 1} shards")
        came = came and wait_until(lambda: find(victim, folder), process, victim)
        time.sleep(jitter)
        pid = find(victim, folder)
        landed = came and pid is not None and not finished(run)
        if landed:
            os.kill(pid, signal.SIGKILL)
        status = process.wait(PATIENCE)  # a command that hangs fails here
        assert finished(run) == (status == 0), (folder / OUTPUT).read_text()
        if victim == "driver" and landed:
            assert status == -signal.SIGKILL
        assert_the_end(folder)
        moment = f"{jitter:.1f} s after its start" if early else f"after shard {after}"
        last = (folder / OUTPUT).read_text().strip().splitlines()[-1:]
        seconds = time.monotonic() - began
        print(f"{victim} {moment}: landed {landed}, status {status}, {committed(run)} shards, {seconds:.0f} s, {last}")
    return landed


def assert_the_end(folder: Path) -> None:
    """No process of the session survives that could work; its agents hold nothing and are not waited for."""
    deadline = time.monotonic() + GRACE
    while working := {p: n for p, n in running_in(folder).items() if not n.startswith(AGENTS)}:
        assert time.monotonic() < deadline, f"still there: {working}"
        time.sleep(0.05)


def objects(run: RunConfig) -> dict[str, bytes]:
    """Everything of the artifact but the record, which has times."""
    store, ref = Store(run.store.url), run.ref(STAGE)
    return {name: store.read(f"{ref}/{name}") for name in store.names(str(ref)) if name != RECORD}


def assert_whole(run: RunConfig, expected: dict[str, bytes]) -> None:
    """The artifact holds every sample once and is, to the byte, what an uninterrupted run leaves."""
    assert objects(run) == expected
    store, ref = Store(run.store.url), run.ref(STAGE)
    ids, samples = [], []
    for shard in read_manifest(store, ref).shards:
        ids += pq.read_table(store.path(f"{ref}/{shard.name}"))["sample_id"].to_pylist()
        samples += pq.read_table(store.path(f"{run.ref('prepare')}/{shard.name}"))["sample_id"].to_pylist()
    assert sorted(ids) == sorted(samples)
    assert len(ids) == len(set(ids)) == 40
    check = targets_check(store, run.ref("prepare"), run.cache, 81)
    assert verify(store, ref, targets_table(run.cache, (0,)), check) == []


def test_stage_whose_processes_are_killed_at_random_ends_with_the_bytes_of_an_uninterrupted_run(
    rounds: Rounds,
) -> None:
    whole = rounds.fresh()
    rounds.finish(whole)
    expected = objects(whole)
    assert {shard_name(index) for index in range(SHARDS)} <= expected.keys()
    chance, landed, artifacts = random.Random(0), Counter[str](), 1
    victims = [victim for victim, count in ROUNDS.items() for _ in range(count)]
    chance.shuffle(victims)
    run = rounds.fresh()
    while victims:
        if kill(rounds, run, victims[-1], chance):
            landed[victims.pop()] += 1
        if committed(run) == SHARDS and not finished(run):  # only the record is missing: nothing left to kill
            rounds.finish(run)
        if finished(run):
            assert_whole(run, expected)
            run, artifacts = rounds.fresh(), artifacts + 1
    rounds.finish(run)
    assert_whole(run, expected)
    print(f"kills that landed: {dict(landed)}, over {artifacts} artifacts")
    assert landed == ROUNDS
