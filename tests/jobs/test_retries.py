"""Workers that are lost: the stage goes on for a while, says so, and ends with an error that says what to do."""

import io
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import jobs.cache
import jobs.prepare
from cluster.session import session
from jobs.stages import run_named
from pipeline.store import Store
from schemas.config import RunConfig
from schemas.errors import WorkersLost
from tests.doomed import DECODE, FOLDER, START, DoomedTeacher, DoomedWorker, doom, doomed_decode
from tests.processes import IN_A_SESSION

pytestmark = IN_A_SESSION
OUT = Console(file=io.StringIO())
FOREVER = 1000


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One session for all, so that only what is tested takes time; the paths of its sockets must be short."""
    with tempfile.TemporaryDirectory(prefix="doom-", dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        Path(folder, "doom").mkdir()
        patch.setenv(FOLDER, f"{folder}/doom")
        patch.setenv("RAY_TMPDIR", folder)
        with session():
            yield


@pytest.fixture
def run(run_of: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setattr(jobs.cache, "TeacherActor", DoomedTeacher)
    place = {"cpus_per_worker": 0.75, "retries": 1}
    return run_of(placement={"prepare": {"workers": 0}, "cache": {**place, "decoders": 1}})


def history(run: RunConfig, name: str) -> dict[str, Any]:
    record = json.loads(Store(run.store.url).read(run.ref(name).record_path))
    found: dict[str, Any] = record["provenance"]["history"]
    return found


def parallel(run: RunConfig) -> RunConfig:
    prepare = run.placement.prepare.model_copy(update={"workers": 1, "cpus_per_worker": 0.5, "retries": 1})
    return run.model_copy(update={"placement": run.placement.model_copy(update={"prepare": prepare})})


@pytest.mark.slow  # half a minute of workers that start and die
def test_a_worker_that_dies_at_one_shard_every_time_ends_the_stage_which_then_goes_on(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs.prepare, "PrepareWorker", DoomedWorker)
    run = parallel(run)
    doom(2, FOREVER)
    with pytest.raises(WorkersLost) as caught:
        run_named("prepare", run, OUT)
    text = str(caught.value)
    assert "prepare/tiny@1/shard-000002.parquet: was begun 2 times by this command (on " in text
    assert "placement.prepare.batch" in text
    assert "placement.prepare.retries (1)" in text
    doom(2, 0)
    run_named("prepare", run, OUT)
    found = history(run, "prepare")
    assert [(c["outcome"], c["workers"]) for c in found["commands"]] == [("failed", 3), ("done", 1)]
    assert found["commands"][0]["error"] == f"WorkersLost: {text}"
    assert found["shards_begun_again"]["shard-000002.parquet"] == 3
    assert not Path(run.store.url, str(run.ref("prepare")), "journal").exists()


@pytest.mark.slow
def test_a_worker_that_dies_once_is_replaced_and_the_record_says_so(run: RunConfig) -> None:
    run_named("prepare", run, OUT)
    doom(3, 1)
    run_named("cache", run, OUT)
    found = history(run, "cache")
    (command,) = found["commands"]
    assert (command["outcome"], command["workers"]) == ("done", 2)
    assert found["shards_begun_again"]["shard-000003.parquet"] == 2


@pytest.mark.slow
def test_workers_that_die_before_they_begin_anything_end_the_stage(run: RunConfig) -> None:
    run_named("prepare", run, OUT)
    doom(START, FOREVER)
    with pytest.raises(WorkersLost, match=r"cache/tiny@1: 2 workers \(on .*\) ended .* before they had begun a shard"):
        run_named("cache", run, OUT)
    doom(START, 0)
    run_named("cache", run, OUT)
    assert [c["outcome"] for c in history(run, "cache")["commands"]] == ["failed", "done"]


@pytest.mark.slow
def test_decoders_that_die_every_time_end_the_stage(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.cache, "decode_shard", doomed_decode)
    run_named("prepare", run, OUT)
    doom(DECODE, FOREVER)
    with pytest.raises(WorkersLost, match=r"cache/tiny@1: .* decod"):
        run_named("cache", run, OUT)
    doom(DECODE, 0)
