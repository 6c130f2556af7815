"""Workers that must go: a checkpoint at once, no result, and the rest of the training elsewhere is what it would be."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import ray.train
import ray.train.collective
import torch
from safetensors.torch import load

from jobs import train
from jobs.stages import open_store
from jobs.train import BACKEND, WEIGHTS, Departure, departure, train_job, train_student
from pipeline.training.loop import stays
from schemas.config import RunConfig
from tests.pipeline.test_training import WORKER, make_cache

RunOf = Callable[..., RunConfig]


def weights(run: RunConfig) -> dict[str, torch.Tensor]:
    return load(open_store(run).read(f"{run.ref('distill')}/{WEIGHTS}"))


@pytest.mark.parametrize("step", [1, 3, 7])
def test_training_that_leaves_after_a_step_goes_on_from_that_step_to_the_same_weights(run_of: RunOf, step: int) -> None:
    run = run_of()
    make_cache(run)
    train_student(train_job(run, "f" * 32), WORKER, lambda _: None)
    moved = run_of(distill={**run.distill.model_dump(), "artifact": "moved@1", "checkpoint_every": 10**6})
    asked = iter(range(1, 100))
    train_student(train_job(moved, "f" * 32), WORKER, lambda _: None, leaves=lambda: next(asked) == step)
    folder = Path(open_store(moved).path(str(moved.ref("distill"))))
    align = run.distill.phases[0].schedule(1).steps
    phase, done = divmod(step, align) if step > align else (0, step)
    assert f"phase-{phase:02d}-step-{done:08d}.safetensors" in {p.name for p in folder.glob("checkpoints/*")}
    assert not (folder / WEIGHTS).exists()
    assert not (folder / BACKEND).exists()
    train_student(train_job(moved, "f" * 32), WORKER, lambda _: None)
    assert all(torch.equal(weights(moved)[name], value) for name, value in weights(run).items())


def test_workers_ask_every_few_seconds_all_at_the_step_that_rank_0_says(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, told, gone = [0.0], list[int](), list[int]()
    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(ray.train.collective, "broadcast_from_rank_zero", lambda steps: told.append(steps) or steps)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: gone or None)
    leaves, asked = Departure(), list[int]()
    for step in range(30):
        clock[0] += 0.25
        before = len(told)
        assert not leaves()
        asked += [step] * (len(told) - before)
    # after the first step, and then every two seconds of a quarter each
    assert asked == [0, 8, 16, 24]
    gone.append(1)
    assert [leaves() for _ in range(3)] == [False, False, True]


def test_where_no_node_can_go_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"})
    assert departure() is stays
    monkeypatch.setattr(os, "environ", {})
    assert isinstance(departure(), Departure)
