"""The stages on a cluster of several nodes with S3 storage: submitted, placed, followed, listed and stopped.

The client has the cluster's address and token, and the files that the run names; nothing of it reaches the store.
"""

import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from jobs.demo.data import write_split
from tests.conftest import tiny_settings
from tests.nodes import Cluster, Loopback, Namespaces, cluster, missing_namespaces, surroundings
from tests.processes import OUTPUT, PATIENCE, wait_until
from tests.servers import KEY, SECRET, rclone

pytestmark = [pytest.mark.ray, pytest.mark.slow]
BUCKET = "decant"
# What the nodes have in their environment, and nobody else. rclone hands out a whole object's checksum with a part.
STORAGE = {
    "AWS_ACCESS_KEY_ID": KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_REQUEST_CHECKSUM_CALCULATION": "WHEN_REQUIRED",
}
# A part of a node's one CPU is left to the tasks that read and decode.
PLACES: dict[str, dict[str, Any]] = {
    "prepare": {"workers": 1, "cpus_per_worker": 0.5, "labels": {"pool": "!student"}},
    "cache": {"cpus_per_worker": 0.5, "decoders": 1, "resources": {"teacher": 1}, "labels": {"pool": "teacher"}},
    "distill": {"cpus_per_worker": 0.75, "resources": {"student": 1}, "labels": {"pool": "student"}},
    "evaluate": {"cpus_per_worker": 0.5, "labels": {"pool": "in(teacher, student)"}},
}
# What the actors of each stage call themselves, with the pool that is theirs.
TEACHER, STUDENT = ("TeacherActor", "teacher"), ("RayTrainWorker", "student")


@dataclass
class Client:
    """A person outside of the cluster: commands run in ``folder``, which holds the run file and what it names."""

    nodes: Cluster
    folder: Path
    storage: Path

    def decant(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command on the cluster, to its end."""
        return subprocess.run(
            [sys.executable, "-m", "jobs.cli", *arguments, "--on", self.nodes.url],
            cwd=self.folder,
            env=self._environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=2 * PATIENCE,
        )

    @contextmanager
    def begun(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """A command on the cluster that goes on beside the block; it has ended after it."""
        with (self.folder / OUTPUT).open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "jobs.cli", *arguments, "--on", self.nodes.url],
                cwd=self.folder,
                env=self._environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def said(self) -> str:
        """What the latest command that was begun has printed."""
        return (self.folder / OUTPUT).read_text()

    def _environment(self) -> dict[str, str]:
        return {**surroundings(), **self.nodes.access, "PYTHONPATH": str(Path.cwd()), "COLUMNS": "200"}

    def write(self, settings: dict[str, Any]) -> None:
        """The settings as the run file ``run.yaml``."""
        (self.folder / "run.yaml").write_text(yaml.safe_dump(settings))

    def on_store(self, pattern: str) -> list[Path]:
        """The objects in the bucket that match."""
        return sorted((self.storage / BUCKET).glob(pattern))


@contextmanager
def outside(
    folder: Path, *names: str, network: Loopback | Namespaces | None = None, cpus: float = 1
) -> Iterator[tuple[Client, str]]:
    """A client of a cluster with such nodes, and the endpoint of the S3 server that the nodes reach."""
    storage, own = folder / "s3", folder / "client"
    (storage / BUCKET).mkdir(parents=True)
    own.mkdir()
    with ExitStack() as running:
        endpoint = running.enter_context(rclone(storage, network.here if network else "127.0.0.1"))
        nodes = running.enter_context(cluster(*names, environment=STORAGE, network=network, cpus=cpus))
        yield Client(nodes, own, storage), endpoint


def carried_settings(client: Client, endpoint: str, teacher: Path, scenes: Path) -> dict[str, Any]:
    """A tiny run whose files lie in the client's folder, named by relative paths, so that they travel."""
    shutil.copytree(teacher, client.folder / "teacher")
    shutil.copytree(scenes, client.folder / "scenes")
    settings = tiny_settings(Path("teacher"), Path("scenes"), Path("store"))
    return {**settings, "store": {"url": f"s3://{BUCKET}/tiny", "endpoint": endpoint}, "placement": PLACES}


def assert_placed(nodes: Cluster, *wanted: tuple[str, str]) -> None:
    """There were actors of these classes, and all of them in these pools."""
    placed = nodes.placed()
    for kind, pool in wanted:
        assert {where for name, where in placed if kind in name} == {pool}, placed


def assert_secret(client: Client) -> None:
    """Nothing written anywhere, no metadata and no process's command line holds the cluster's token or S3's secret."""
    planted = [SECRET.encode(), client.nodes.access["RAY_AUTH_TOKEN"].encode()]
    files = [
        path
        for folder in (client.nodes.folder, client.storage, client.folder)
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    ]
    assert len(files) > 50, "nothing was looked at"
    assert [path for path in files if any(secret in path.read_bytes() for secret in planted)] == []
    lines = [" ".join(p.cmdline()) for node in client.nodes.nodes.values() for p in node.processes()]
    told = [str(client.nodes.get("/api/jobs/")), *lines]
    assert "decant.stages" in told[0]
    assert [text for text in told if any(secret.decode() in text for secret in planted)] == []


def test_stages_run_as_one_job_on_the_nodes_of_their_pools_and_tell_no_secrets(
    tiny_teacher: Path, scenes_folder: Path, tmp_path: Path
) -> None:
    with outside(tmp_path, "teacher") as (client, endpoint):
        client.write(carried_settings(client, endpoint, tiny_teacher, scenes_folder))
        few = ("--set", "placement.prepare.workers=0")  # seconds less
        done = client.decant("run", "run.yaml", "--stages", "prepare,cache", *few)
        assert done.returncode == 0, done.stdout
        assert "cache/tiny@1 done in" in done.stdout
        assert len(client.on_store("tiny/cache/tiny@1/shard-*.parquet")) == 10
        assert client.on_store("tiny/cache/tiny@1/record.json")
        assert_placed(client.nodes, TEACHER)
        assert_secret(client)


DEMO = {
    "distill.phases.0.steps": 40,
    "distill.phases.0.decay_steps": 10,
    "distill.phases.1.steps": 12,
    "distill.phases.1.decay_steps": 4,
    "distill.phases.1.batch": 16,
    "prepare.shard_rows": 32,
    **{f"placement.{stage}": place for stage, place in PLACES.items()},
}


def draw_demo(client: Client, endpoint: str) -> list[str]:
    """The demo's files as they lie in the repository, with few scenes; returns the options that make it small."""
    shutil.copytree("jobs/demo/teacher", client.folder / "jobs" / "demo" / "teacher")
    shutil.copyfile("jobs/configs/demo.yaml", client.folder / "demo.yaml")
    data = client.folder / "runs" / "demo" / "data"
    write_split(data / "train.json", "train", 64, seed=0)
    write_split(data / "test.json", "test", 12, seed=0)
    changes = {**DEMO, "store": {"url": f"s3://{BUCKET}/demo", "endpoint": endpoint}}
    return [
        part
        for name, value in changes.items()
        for part in ("--set", f"{name}={yaml.safe_dump(value, default_flow_style=True).removesuffix('...').strip()}")
    ]


def assert_demo_made(client: Client) -> None:
    stages = ("prepare", "cache", "distill", "evaluate", "export")
    assert {path.parent.parent.name for path in client.on_store("demo/*/demo@1/record.json")} == set(stages)
    assert_placed(client.nodes, TEACHER, STUDENT)
    pools = client.nodes.pools()
    decoded = {pools[t["node_id"]] for t in client.nodes.state("tasks") if "decode_shard" in t["name"]}
    assert decoded <= {"teacher", "student", "cpu"}
    assert decoded
    assert_secret(client)


def test_the_demo_goes_through_stage_by_stage_and_each_is_done_once(tmp_path: Path) -> None:
    with outside(tmp_path, "teacher", "student", "cpu") as (client, endpoint):
        changes = draw_demo(client, endpoint)
        for stage in ("prepare", "cache", "distill", "evaluate", "export"):
            done = client.decant(stage, "demo.yaml", *changes)
            assert done.returncode == 0, done.stdout
            assert f"{stage}/demo@1 done in" in done.stdout
        assert_demo_made(client)
        again = client.decant("export", "demo.yaml", *changes)
        assert again.returncode == 0
        assert "already done" in again.stdout


@pytest.mark.skipif(missing_namespaces() is not None, reason=str(missing_namespaces()))
def test_the_demo_goes_through_as_one_job_between_nodes_that_share_only_a_network(tmp_path: Path) -> None:
    with Namespaces() as network, outside(tmp_path, "teacher", "student", "cpu", network=network) as (client, endpoint):
        done = client.decant(
            "run", "demo.yaml", "--stages", "prepare,cache,distill,evaluate,export", *draw_demo(client, endpoint)
        )
        assert done.returncode == 0, done.stdout
        assert_demo_made(client)


@pytest.fixture(scope="module")
def tiny(tiny_teacher: Path, scenes_folder: Path) -> Iterator[Client]:
    """A client with ``run.yaml``, whose samples are prepared, on a cluster with one node of each pool."""
    with (
        tempfile.TemporaryDirectory(prefix="decant-") as folder,
        outside(Path(folder), "teacher", "student") as (client, endpoint),
    ):
        client.write(carried_settings(client, endpoint, tiny_teacher, scenes_folder))
        done = client.decant("run", "run.yaml", "--stages", "prepare")
        assert done.returncode == 0, done.stdout
        yield client


def test_what_a_user_can_put_right_ends_the_command_as_it_would_here(tiny: Client) -> None:
    early = tiny.decant("evaluate", "run.yaml")
    assert early.returncode == 2
    assert "ArtifactMissing" in early.stdout
    assert "run `decant distill RUN.yaml` first" in early.stdout
    assert "Traceback" not in early.stdout


def test_a_placement_that_the_nodes_cannot_hold_is_refused_with_what_there_is(tiny: Client) -> None:
    huge = tiny.decant("cache", "run.yaml", "--set", "placement.cache.workers=2", "--set", "cache.artifact=huge@1")
    assert huge.returncode == 2
    assert "ConfigInvalid" in huge.stdout
    assert "placement.cache: 2 workers" in huge.stdout
    assert "pool: teacher" in huge.stdout
    assert tiny.on_store("tiny/cache/huge@1/shard-*") == []


def test_a_client_without_the_token_is_refused(tiny: Client) -> None:
    tiny.nodes.access, kept = {**tiny.nodes.access, "RAY_AUTH_TOKEN": "0" * 64}, tiny.nodes.access
    try:
        refused = tiny.decant("jobs", "list")
    finally:
        tiny.nodes.access = kept
    assert refused.returncode == 2
    assert "ClusterUnavailable" in refused.stdout


LONG = ("--set", "distill.phases.1.steps=100000", "--set", "distill.artifact=long@1")


def test_ctrl_c_leaves_the_job_running_and_it_can_be_listed_followed_and_stopped(tiny: Client) -> None:
    assert tiny.decant("cache", "run.yaml").returncode == 0
    with tiny.begun("distill", "run.yaml", *LONG) as process:
        checkpoints = "tiny/distill/long@1/checkpoints/*"
        assert wait_until(lambda: tiny.on_store(checkpoints), process, "a checkpoint"), tiny.said()
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
    told = re.search(r"decant jobs logs (\S+) --on", tiny.said())
    assert told, tiny.said()
    job, before = told[1], tiny.on_store(checkpoints)
    with tiny.begun("jobs", "logs", job) as process:
        assert wait_until(lambda: tiny.on_store(checkpoints) != before, process, "one more"), tiny.said()
        assert wait_until(lambda: "distill" in tiny.said(), process, "the job's log")
        listed = tiny.decant("jobs", "list")
        assert re.search(rf"{job}\n  running,", listed.stdout), listed.stdout
        assert tiny.decant("jobs", "stop", job).returncode == 0
        assert process.wait(PATIENCE) == 130
    assert re.search(rf"{job}\n  stopped,", tiny.decant("jobs", "list").stdout)
    working = [p for n in tiny.nodes.nodes.values() for p in n.processes() if "RayTrainWorker" in " ".join(p.cmdline())]
    assert psutil.wait_procs(working, timeout=PATIENCE)[1] == []


def test_nothing_tells_a_secret_after_all_of_that(tiny: Client) -> None:
    assert_secret(tiny)
