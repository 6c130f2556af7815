"""Nodes, actors, the head and the store that go away while stages run on a cluster: what is made stays the same."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.numpy import load

from jobs.demo.data import write_split
from jobs.train import WEIGHTS, train_job, train_student
from pipeline.store import Store
from schemas.artifacts import CHECKPOINTS, RECORD
from schemas.config import RunConfig
from tests.conftest import tiny_settings
from tests.jobs.test_cluster import BUCKET, PLACES, STORAGE, Client
from tests.nodes import Cluster, cluster
from tests.pipeline.test_training import WORKER, curve_of, make_cache
from tests.processes import PATIENCE, wait_until
from tests.servers import free_port, rclone

pytestmark = [pytest.mark.ray, pytest.mark.slow]
# One sample a shard: many moments at which something can go away.
SCENES = 160
# Steps enough for what goes away to fall among them.
PHASES = [
    {"kind": "align", "steps": 60, "batch": 4, "lr": 1e-3},
    {"kind": "distill", "steps": 400, "batch": 4, "lr": 1e-3, "decay_steps": 60},
]
EVERY = 10
# For how long the S3 server is away; the store's own patience is half a minute.
AWAY = 8.0
# How much more of the machine's memory than now is in use when the monitor of a node begins to kill: more than other
# processes of a busy machine take and give back meanwhile.
HEADROOM = 3 * 2**30


@dataclass(frozen=True)
class Whole:
    """What an undisturbed run leaves: a finished store, and its settings."""

    settings: dict[str, Any]
    store: Path

    def run(self) -> RunConfig:
        """The undisturbed run."""
        return RunConfig.model_validate({**self.settings, "store": str(self.store)})


@pytest.fixture(scope="module")
def whole(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The undisturbed run, in this process: samples, cache and training."""
    folder = tmp_path_factory.mktemp("whole")
    write_split(folder / "train.json", "train", SCENES, seed=0)
    settings = tiny_settings(tiny_teacher, folder, folder / "store")
    settings["evaluate"] = {"data": str(folder / "train.json"), "images": str(folder)}
    settings["prepare"]["shard_rows"] = 1
    settings["distill"] = {"phases": PHASES, "checkpoint_every": EVERY}
    settings["placement"] = {**PLACES, "prepare": {"workers": 0}}
    found = Whole(settings, folder / "store")
    make_cache(found.run())
    torch.set_num_threads(1)  # as many as a worker of the cluster has
    train_student(train_job(found.run(), "whole"), WORKER, lambda _: None)
    return found


@dataclass
class Scene:
    """A cluster of which things are taken away, a run on it, and the S3 server on which its artifacts lie."""

    nodes: Cluster
    client: Client
    run: RunConfig
    server: ExitStack
    endpoint: str

    def committed(self, pattern: str) -> int:
        """How many objects of the run's store match."""
        return len(self.client.on_store(f"run/{pattern}"))

    def serve(self) -> None:
        """Starts the S3 server where it was."""
        self.server.enter_context(rclone(self.client.storage, port=int(self.endpoint.rpartition(":")[2])))

    def disturbed(
        self, stage: str, moment: Callable[[], bool], disturb: Callable[[], object], mend: Callable[[], object] = int
    ) -> int:
        """Runs a stage, disturbs it at the moment and mends what it can; returns the command's exit code."""
        with self.client.begun(stage, "run.yaml") as process:
            came = wait_until(moment, process, "the moment to disturb")
            assert came, self.client.said()
            disturb()
            assert not self.committed(f"{stage}/*/{RECORD}"), "it was over before it was disturbed"
            mend()
            return process.wait(2 * PATIENCE)


@contextmanager
def scene(
    whole: Whole, folder: Path, *names: str, has: tuple[str, ...], teachers: int = 1, checkpoint_every: int = EVERY
) -> Iterator[Scene]:
    """A run of which the artifacts ``has`` are made already, on a cluster with such nodes."""
    storage, own = folder / "s3", folder / "client"
    own.mkdir()
    for ref in has:
        shutil.copytree(whole.store / ref, storage / BUCKET / "run" / ref)
    endpoint = f"http://127.0.0.1:{free_port()}"
    placement = whole.settings["placement"]
    placement = {**placement, "cache": {**placement["cache"], "workers": teachers}}
    distill = {**whole.settings["distill"], "checkpoint_every": checkpoint_every}
    store = {"url": f"s3://{BUCKET}/run", "endpoint": endpoint}
    settings = {**whole.settings, "store": store, "distill": distill, "placement": placement}
    with ExitStack() as server, cluster(*names, environment=STORAGE) as nodes:
        client = Client(nodes, own, storage)
        client.write(settings)
        # the objects as files, because this process does not have the nodes' credentials
        run = RunConfig.model_validate({**settings, "store": str(storage / BUCKET / "run")})
        made = Scene(nodes, client, run, server, endpoint)
        made.serve()
        yield made


SAMPLES, CACHE = "prepare/tiny@1", "cache/tiny@1"


def assert_same_cache(scene: Scene, whole: Whole) -> None:
    """Every object but the record, which has times, is to the byte that of the undisturbed run."""
    here, there = Store(scene.run.store.url), Store(str(whole.store))
    names = [name for name in there.names(CACHE) if name != RECORD]
    assert [name for name in here.names(CACHE) if name != RECORD] == names
    assert len(names) > SCENES
    assert [n for n in names if here.read(f"{CACHE}/{n}") != there.read(f"{CACHE}/{n}")] == []
    assert here.exists(f"{CACHE}/{RECORD}")


def assert_same_training(scene: Scene, whole: Whole) -> None:
    """Loss, rate and gradient of every step, and so the order of samples, and the weights, are the same."""
    assert curve_of(scene.run) == curve_of(whole.run())
    assert_same_weights(scene, whole)


def assert_same_weights(scene: Scene, whole: Whole) -> None:
    """Every trained parameter has the undisturbed run's bits, which another sample at any step would change."""
    name = f"{scene.run.ref('distill')}/{WEIGHTS}"
    here, there = (load(Store(run.store.url).read(name)) for run in (scene.run, whole.run()))
    assert here.keys() == there.keys()
    assert all((here[n] == there[n]).all() for n in there)


def shards(scene: Scene, count: int) -> Callable[[], bool]:
    return lambda: scene.committed(f"{CACHE}/shard-*.parquet") >= count


def checkpoints(scene: Scene) -> set[str]:
    return {path.name for path in scene.client.on_store(f"run/distill/tiny@1/{CHECKPOINTS}/*")}


def training(scene: Scene) -> Callable[[], bool]:
    """The second phase has begun, a third into the steps."""
    return lambda: any(name.startswith("phase-01") for name in checkpoints(scene))


def pool_of(nodes: Cluster, kind: str) -> str:
    """The name of the node on which an actor of such a class lives."""
    hosts = {node.host: name for name, node in nodes.nodes.items()}
    ids = {n["node_id"]: hosts[n["node_ip"]] for n in nodes.state("nodes") if n["node_ip"] in hosts}
    (found,) = (ids[a["node_id"]] for a in nodes.state("actors") if kind in a["class_name"] and a["state"] == "ALIVE")
    return found


def test_cache_goes_on_with_the_remaining_node_when_one_is_killed(whole: Whole, tmp_path: Path) -> None:
    with scene(whole, tmp_path, "teacher", "teacher-2", has=(SAMPLES,), teachers=2) as made:
        code = made.disturbed("cache", shards(made, 10), lambda: made.nodes.kill("teacher-2"))
        assert code == 0, made.client.said()
        assert_same_cache(made, whole)


def test_cache_goes_on_with_a_new_node_when_the_only_one_is_killed(whole: Whole, tmp_path: Path) -> None:
    with scene(whole, tmp_path, "teacher", has=(SAMPLES,)) as made:
        kill, replace = lambda: made.nodes.kill("teacher"), lambda: made.nodes.add("teacher-2")
        code = made.disturbed("cache", shards(made, 10), kill, replace)
        assert code == 0, made.client.said()
        assert_same_cache(made, whole)


def test_cache_goes_on_when_the_store_was_away(whole: Whole, tmp_path: Path) -> None:
    with scene(whole, tmp_path, "teacher", has=(SAMPLES,)) as made:
        code = made.disturbed("cache", shards(made, 10), made.server.close, lambda: (time.sleep(AWAY), made.serve()))
        assert code == 0, made.client.said()
        assert_same_cache(made, whole)


def test_cache_goes_on_when_the_memory_monitor_killed_its_teacher(whole: Whole, tmp_path: Path) -> None:
    with scene(whole, tmp_path, "student", has=(SAMPLES,)) as made:
        memory = psutil.virtual_memory()
        limit = (memory.total - memory.available + HEADROOM) / memory.total
        made.nodes.add("teacher", RAY_memory_usage_threshold=f"{limit:.4f}", RAY_memory_monitor_refresh_ms="100")
        code = made.disturbed("cache", shards(made, 10), lambda: starve(made.nodes, limit))
        assert code == 0, made.client.said()
        assert_same_cache(made, whole)


def starve(nodes: Cluster, limit: float) -> None:
    """Takes memory until a node's monitor kills its teacher, then gives it back."""
    taken, deadline = [], time.monotonic() + PATIENCE

    def killed() -> bool:
        return any("TeacherActor" in a["class_name"] and int(a["num_restarts"]) for a in nodes.state("actors"))

    while not killed():
        assert time.monotonic() < deadline, "the monitor killed nothing"
        if psutil.virtual_memory().percent < 100 * limit + 1:
            taken.append(bytearray(b"x") * 2**28)


def test_the_same_command_goes_on_after_the_whole_cluster_went_away(whole: Whole, tmp_path: Path) -> None:
    with scene(whole, tmp_path, "teacher", has=(SAMPLES,)) as made:
        assert made.disturbed("cache", shards(made, 10), made.nodes.stop, made.nodes.restart) == 2
        assert "ClusterLost" in made.client.said()
        before = made.committed(f"{CACHE}/shard-*.parquet")
        assert 10 <= before < SCENES
        done = made.client.decant("cache", "run.yaml")
        assert done.returncode == 0, done.stdout
        assert_same_cache(made, whole)


def test_the_head_is_restarted_between_two_stages(whole: Whole, tmp_path: Path) -> None:
    with scene(whole, tmp_path, "teacher", "student", has=(SAMPLES,)) as made:
        assert made.client.decant("cache", "run.yaml").returncode == 0
        made.nodes.restart()
        done = made.client.decant("distill", "run.yaml")
        assert done.returncode == 0, done.stdout
        assert_same_cache(made, whole)
        assert_same_training(made, whole)


def test_distill_goes_on_elsewhere_when_its_node_is_killed(whole: Whole, tmp_path: Path) -> None:
    with scene(whole, tmp_path, "student", "student-2", has=(SAMPLES, CACHE)) as made:
        code = made.disturbed(
            "distill",
            training(made),
            lambda: made.nodes.kill(pool_of(made.nodes, "RayTrainWorker")),
        )
        assert code == 0, made.client.said()
        assert "a worker was lost" in made.client.said()
        assert_same_training(made, whole)


def test_a_drained_node_hands_its_training_over(whole: Whole, tmp_path: Path) -> None:
    """A checkpoint is saved at once, where none was due, and the group moves before the node is gone."""
    with scene(whole, tmp_path, "student", "student-2", has=(SAMPLES, CACHE), checkpoint_every=10_000) as made:
        seen: set[str] = set()
        with watched(lambda: seen.update(checkpoints(made))):
            code = made.disturbed(
                "distill",
                training(made),
                lambda: made.nodes.drain(pool_of(made.nodes, "RayTrainWorker"), seconds=60),
            )
        assert code == 0, made.client.said()
        assert "nodes are being taken away" in made.client.said()
        ends = {"phase-01-step-00000000.safetensors", "phase-02-step-00000000.safetensors"}
        assert len(seen - ends) == 1, seen
        assert_same_weights(made, whole)  # its curve has a point more, before that checkpoint


@contextmanager
def watched(look: Callable[[], object]) -> Iterator[None]:
    """Looks again and again beside the block."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            look()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
