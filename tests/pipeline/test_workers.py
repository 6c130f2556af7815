"""Whole trainings by two processes: other engines, other shares of the work, other numbers of workers, one curve."""

import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load
from torch import multiprocessing

from jobs.stages import open_store
from jobs.train import WEIGHTS, train_job, train_student
from pipeline.training.engine import Worker
from schemas.config import RunConfig
from tests.pipeline.test_training import curve_of, make_cache, train
from tests.tolerances import ENGINE_CURVE

PHASES = [
    {"kind": "align", "steps": 3, "batch": 6, "lr": 1e-3},
    {"kind": "distill", "steps": 6, "batch": 6, "lr": 1e-3},
]
VALIDATION = {"fraction": 0.3, "every": 3}
# What each case changes of the placement.
CASES: dict[str, dict[str, Any]] = {
    "data": {"align": "data"},
    "layers": {"align": "layers"},
    "zero1": {"strategy": "zero1"},
    "zero2": {"strategy": "zero2"},
    "zero2-offload": {"strategy": "zero2", "offload": True},
    "zero3": {"strategy": "zero3"},
}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def work(rank: int, world: int, port: int, backend: str, runs: list[str]) -> None:
    """One process: all runs, one after the other."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    for text in runs:
        run = RunConfig.model_validate_json(text)
        train_student(train_job(run, "f" * 32), Worker(rank, world, device), lambda _: None, lambda _: None)
        dist.barrier()
    dist.destroy_process_group()


def of_case(run_of: Callable[..., RunConfig], case: str, **more: Any) -> RunConfig:
    place = {"workers": 2, "micro_batch": 2, **CASES[case]}
    return run_of(
        student={"layers": {"list": [0, 2]}},
        cache={"taps": {"fraction": 1.0}},
        distill={"phases": PHASES, "artifact": f"{case}@1", "checkpoint_every": 2, "validation": VALIDATION, **more},
        placement={"prepare": {"workers": 0}, "distill": place, "device": "auto"},
    )


def check(run_of: Callable[..., RunConfig], backend: str) -> None:
    """Two processes with each case, against one; then a run that one begins and two end."""
    alone = of_case(run_of, "data", artifact="alone@1")
    make_cache(alone)
    whole, expected = train(alone), curve_of(alone)
    runs = [of_case(run_of, case) for case in CASES]
    begun = of_case(run_of, "data", artifact="begun@1")

    def stop(entry: dict[str, Any]) -> None:
        if entry["done"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(begun, stop)
    begun = of_case(run_of, "zero2", artifact="begun@1")
    texts = [r.model_dump_json() for r in (*runs, begun)]
    multiprocessing.spawn(work, (2, free_port(), backend, texts), nprocs=2)
    for run in (*runs, begun):
        name, curve = str(run.ref("distill")), curve_of(run)
        assert [e["done"] for e in curve] == [e["done"] for e in expected], name
        for one, two in zip(curve, expected, strict=True):
            watched = ["held_out_kl"] if "held_out_kl" in two and "zero3" not in name else []
            for key in ("loss", "grad_norm", *watched):
                assert one[key] == pytest.approx(two[key], rel=ENGINE_CURVE), (name, one["done"], key)
        trained = load(open_store(run).read(f"{name}/{WEIGHTS}"))
        assert trained.keys() == whole.keys()
        for key, value in whole.items():
            assert float((trained[key] - value).norm()) <= 10 * ENGINE_CURVE * float(value.norm() + 1), (name, key)


@pytest.mark.slow  # half a minute; the default tests have two workers in Ray (test_engines)
def test_two_processes_train_as_one_with_every_engine_and_share_of_the_work(
    run_of: Callable[..., RunConfig], tmp_path: Path
) -> None:
    check(run_of, "gloo")


@pytest.mark.multigpu
def test_two_devices_train_as_one_with_every_engine_and_share_of_the_work(
    run_of: Callable[..., RunConfig], tmp_path: Path
) -> None:
    check(run_of, "nccl")
