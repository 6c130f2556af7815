"""The benchmarks run, at sizes for two CPU cores, and leave figures in the one form; how fast they are is no claim."""

import importlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench.through import WARM, Seen

SHARDS = "--small --shards 2 --shard-rows 2 --batch 2 --text 30"
# Of the scripts that need neither Ray nor a run file, with what makes them small.
QUICK = {
    "capture": f"{SHARDS} --rounds 1 --sides process",
    "decode": "--small --points 1x6 --generate 1x6 --new-tokens 3 --repeats 1",
    "mixer": "--small --rounds 1",
    "journal": "--shards 20 --local",
    "reading": "--samples 2 --copied 1048576",
    "targets": "--samples 2",
}
# Of those that start Ray, or processes of their own.
STARTING = {
    "capture": f"{SHARDS} --rounds 1 --sides stage",
    "cluster": "--workers 1 --shards 4 --sleep 0.1 --rounds 1",
    "fleet": f"{SHARDS} --rounds 1 --gpus 1 2 --variants sampled",
    "scaling": "--small --gpus 1 2 --rounds 1 --steps 2",
}
FIELDS = {"topic", "command", "sides", "ratios", "floor", "commit", "date", "hardware"}
Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """Runs a script's main in this process and gives what it left; what it set of the process is as before."""
    before, dtype = dict(os.environ), torch.get_default_dtype()
    torch.set_num_threads(1)  # so small that threads would wait for each other, on a busy machine for minutes

    def run(name: str, *arguments: str) -> dict[str, Any]:
        script = importlib.import_module(f"tests.bench.{name}")
        script.main([*arguments, "--json", str(tmp_path / "figures.json")])
        found: dict[str, Any] = json.loads((tmp_path / "figures.json").read_text())
        return found

    yield run
    os.environ.clear()
    os.environ.update(before)
    torch.set_default_dtype(dtype)


def check(found: dict[str, Any], name: str) -> None:
    """The form: every field, sides with figures, ratios that are numbers, and a floor that was measured."""
    assert set(found) == FIELDS
    assert found["topic"] == name
    assert found["command"].startswith(f"python -m tests.bench.{name} ")
    assert all(figures for figures in found["sides"].values())
    assert found["ratios"]
    assert all(isinstance(ratio, float) and math.isfinite(ratio) and ratio > 0 for ratio in found["ratios"].values())
    assert found["floor"] is None or found["floor"] in found["sides"]
    assert {"cpus", "gpus", "versions"} <= set(found["hardware"])


@pytest.mark.parametrize("name", QUICK)
def test_small_benchmark_runs_and_leaves_ratios(name: str, bench: Bench) -> None:
    check(bench(name, *QUICK[name].split()), name)


@pytest.mark.slow  # each starts Ray, nodes or groups of processes: a minute
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # Ray warns of its own defaults
@pytest.mark.parametrize("name", STARTING)
def test_benchmark_of_processes_runs_and_leaves_ratios(name: str, bench: Bench) -> None:
    check(bench(name, *STARTING[name].split()), name)


@pytest.mark.slow  # each goes through stages of a run
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("initialisation", ()),
        ("recipes", ("--only", "mimic", "kl-only")),
        ("students", ("--only", "1", "--set", "distill.validation={fraction: 0.2}")),
    ],
)
def test_benchmark_of_a_run_leaves_ratios(name: str, arguments: tuple[str, ...], bench: Bench, run_file: Path) -> None:
    check(bench(name, str(run_file), *arguments), name)


def seen(workers: int, ends: dict[str, list[float]], late: float = 0.0) -> Seen:
    """A stage whose shards have 100 tokens and one forward of half a second, from the seconds at which each worker's
    forwards end; commits come ``late``."""
    noted = [{"process": p, "time": t + late, "gpu": p} for p, times in ends.items() for t in times]
    busy = {p: [(t - 0.5, t) for t in times] for p, times in ends.items()}
    readings = [(0.5, "a", 0.0), (WARM + 0.5, "a", 0.9), (WARM + 0.5, "b", 0.0)]
    return Seen(workers, 100, sorted(noted, key=lambda note: float(note["time"])), [], [], busy, readings, 0)


def test_what_counts_begins_when_the_warm_shards_are_computed() -> None:
    # the warm ones take ten times as long
    times = [10.0 * (i - WARM + 1) for i in range(WARM)] + [float(i) for i in range(1, 6)]
    found = seen(1, {"a": [time + WARM for time in times]})
    assert found.rate == found.steady == 100
    assert found.busy_share == 0.5
    assert found.smi_share == 0.9, "of the worker's device, while it counts"


def test_what_a_device_did_before_the_others_were_warm_does_not_count() -> None:
    first = [float(i) for i in range(WARM + 5)]
    found = seen(2, {"a": first, "b": [end + 0.75 for end in first]})
    # of five seconds: five halves of the later worker, and of the other's first half second the last quarter
    assert found.busy_share == pytest.approx((5 * 0.5 + 4 * 0.5 + 0.25) / 5 / 2)


def test_shards_that_were_computed_before_make_no_rate_that_the_device_cannot_have() -> None:
    found = seen(1, {"a": [float(i) for i in range(WARM + 8)]}, late=2.0)
    assert found.rate == found.steady == 80, "8 shards in 8 seconds, and 2 until the last is written"


def test_a_worker_that_ends_late_or_comes_late_is_no_loss_of_the_steady_rate() -> None:
    early = [float(i) for i in range(WARM + 5)]
    late = [2.0 * i for i in range(WARM + 5)]
    found = seen(3, {"a": early, "b": late, "c": [1.0]})
    assert found.steady == pytest.approx(150)
    assert found.rate < 150
