"""What a cluster costs ``cache``: ``python -m tests.bench.cluster [--workers 1 2 4] [--rounds 3]``.

A head and a node for every worker, all on this machine. First the seconds from the command to the first committed
shard: in a session of its own, in the cluster (``--on auto``), and as a job of it (``--on http://…``), medians of
rounds. Then the scaling: teachers that sleep instead of computing, one at a time as on a device, and otherwise do
what teachers do (samples come in, a shard is committed), so that what is lost is the engine's. Efficiency is the
sleep that the shards need over what passed, from the first shard to the last and from the start of the dataset.
Prints tables.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

import jobs.cache
from jobs.demo import teacher_model
from jobs.demo.data import write_split
from pipeline.store import Store
from schemas.config import RunConfig
from schemas.manifest import shard_name
from tests.bench.result import Result, add_json, command, print_table
from tests.conftest import tiny_model, tiny_settings
from tests.nodes import Cluster, cluster, surroundings

# Tens of kilobytes, as a shard of targets without taps has.
PAYLOAD = bytes(2**15)
SLEEP = "DECANT_BENCH_SLEEP"
TEACHER = {"cpus_per_worker": 0.5, "decoders": 2, "resources": {"teacher": 1}, "labels": {"pool": "teacher"}}


class SleepingTeacher:
    """Takes as long as it is told for a shard, one shard at a time, and commits what is no shard."""

    def __init__(self, job: jobs.cache.CacheJob) -> None:
        self.job, self.store, self.device = job, Store(job.store), ThreadPoolExecutor(1)

    def __call__(self, row: pa.Table) -> pa.Table:
        """Sleeps and commits; returns the shard's index and a row."""
        index = row["shard"][0].as_py()
        self.device.submit(time.sleep, float(os.environ[SLEEP])).result()
        self.store.write(f"{self.job.targets}/{shard_name(index)}", PAYLOAD)
        return pa.table({"shard": [index], "rows": [1]})


def prepared(folder: Path, samples: int) -> dict[str, Any]:
    """The settings of a tiny run with so many samples, a shard each, which are prepared."""
    write_split(folder / "train.json", "train", samples, seed=0)
    tiny_model().save_pretrained(folder / "teacher")
    teacher_model.build_processor().save_pretrained(folder / "teacher")
    settings = tiny_settings(folder / "teacher", folder, folder / "store")
    settings["evaluate"] = {"data": str(folder / "train.json"), "images": str(folder)}
    settings["prepare"]["shard_rows"] = 1
    settings["placement"] = {"prepare": {"workers": 0}, "cache": TEACHER}
    write_run(folder, settings)
    _decant(folder, {}, "prepare").wait()
    return settings


def write_run(folder: Path, settings: dict[str, Any]) -> None:
    """The run file."""
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))


def _decant(folder: Path, environment: dict[str, str], *arguments: str) -> subprocess.Popen[bytes]:
    decant = [sys.executable, "-m", "jobs.cli", arguments[0], "run.yaml", *arguments[1:]]
    known = {**surroundings(), "PYTHONPATH": str(Path.cwd()), **environment}
    return subprocess.Popen(decant, cwd=folder, env=known, stdout=subprocess.DEVNULL)


def to_first_shard(folder: Path, nodes: Cluster, on: str) -> tuple[float, float]:
    """Seconds from the command to its first shard, and to its end."""
    target = folder / "store" / "cache"
    shutil.rmtree(target, ignore_errors=True)
    access = {**nodes.access, "RAY_ADDRESS": nodes.address} if on == "auto" else nodes.access if on != "local" else {}
    began = time.perf_counter()
    process = _decant(folder, access, "cache", "--on", on)
    while not any(target.glob("*/shard-*.parquet")):
        assert process.poll() is None, f"ended with {process.returncode}"
        time.sleep(0.01)
    first = time.perf_counter() - began
    assert process.wait() == 0
    return first, time.perf_counter() - began


def overhead(folder: Path, nodes: Cluster, rounds: int) -> dict[str, dict[str, float]]:
    """Medians of rounds, the three ways in turn."""
    ways = {"local": "local", "auto": "auto", "http": nodes.url}
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, on in ways.items():
            found[way].append(to_first_shard(folder, nodes, on))
    return {
        way: {
            "first shard s": statistics.median(f for f, _ in seen),
            "end s": statistics.median(e for _, e in seen),
        }
        for way, seen in found.items()
    }


def scaling(settings: dict[str, Any], workers: int, shards: int, sleep: float) -> dict[str, float]:
    """One dataset over that many sleeping teachers, in the session that is running."""
    place = {**TEACHER, "workers": workers}
    run = RunConfig.model_validate({**settings, "placement": {**settings["placement"], "cache": place}})
    job = jobs.cache.cache_job(run, "bench")
    began, times = time.perf_counter(), []
    for _ in jobs.cache.committed(job, run.placement.cache, list(range(shards))):
        times.append(time.perf_counter())
    assert len(times) == shards
    return {
        "shards": shards,
        "first shard s": times[0] - began,
        "seconds": times[-1] - began,
        # the first shards of all workers come at once
        "efficiency": (shards - workers) * sleep / workers / (times[-1] - times[0]),
        "with start": shards * sleep / workers / (times[-1] - began),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--shards", type=int, default=40, help="a worker")
    parser.add_argument("--sleep", type=float, default=1.0, help="seconds a shard")
    parser.add_argument("--rounds", type=int, default=3)
    add_json(parser)
    given = parser.parse_args(arguments)
    most = max(given.workers)
    with tempfile.TemporaryDirectory() as name:
        folder, names = Path(name), [f"teacher-{number}" for number in range(most)]
        settings = prepared(folder, most * given.shards)
        environment = {"PYTHONPATH": str(Path.cwd()), SLEEP: str(given.sleep)}
        began = time.perf_counter()
        with cluster(*names, environment=environment) as nodes:
            size = {f"MiB of {n}": node.memory() / 2**20 for n, node in nodes.nodes.items()}
            start = {"cluster": {"nodes": 1 + most, "start s": time.perf_counter() - began, **size}}
            ways = overhead(folder, nodes, given.rounds)
            print_table(ways)
            os.environ.update({**nodes.access, "RAY_ADDRESS": nodes.address})
            scaled = scalings(settings, given)
    print_table(scaled)
    ratios = {f"{side}: efficiency": figures["efficiency"] for side, figures in scaled.items()}
    ratios |= {
        f"{way} / local: first shard": f["first shard s"] / ways["local"]["first shard s"] for way, f in ways.items()
    }
    Result("cluster", command("cluster", arguments), {**start, **ways, **scaled}, ratios).write(given.json)


def scalings(settings: dict[str, Any], given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The scaling for every number of workers, in the cluster that the environment names."""
    from cluster.session import session

    jobs.cache.TeacherActor = SleepingTeacher  # type: ignore[assignment,misc]
    with session(join=True):
        return {
            f"{workers} sleeping": scaling(settings, workers, workers * given.shards, given.sleep)
            for workers in given.workers
        }


if __name__ == "__main__":
    # by its name, so that the teachers' class is importable on the nodes
    from tests.bench.cluster import main as run

    run()
