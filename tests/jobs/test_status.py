"""``decant status``: what it says of stages before, while and after they run, here and on S3, from the store alone."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs
import yaml

import jobs.status
from jobs import prepare
from jobs.stages import NAMES, open_store
from pipeline import observe
from pipeline.journal import Attempts, Journal, begin, facts
from pipeline.stage import Stage, run_stage
from pipeline.store import Store
from schemas.artifacts import CHECKPOINTS, LOG, ArtifactRef
from schemas.config import RunConfig
from schemas.errors import StoreUnavailable, WorkersLost
from schemas.manifest import shard_name
from tests.jobs.test_cli import decant
from tests.pipeline.test_training import make_cache
from tests.processes import started, wait_until
from tests.servers import KEY, SECRET, rclone

FRAMEWORKS = {"torch", "ray", "transformers", "deepspeed", "matplotlib"}
ENTRY = {
    "phase": 1,
    "kind": "distill",
    "step": 30,
    "steps": 100,
    "done": 80,
    "total": 150,
    "loss": 1.5,
    "kl": 1.25,
    "ce": 2.0,
    "layer_0": 0.25,
    "layer_2": 0.75,
    "steps_per_second": 0.5,
    "tokens_per_second": 1234.5,
}


def file_of(run: RunConfig, folder: Path) -> str:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    return str(path)


def seen(run_file: str) -> dict[str, dict[str, Any]]:
    done = decant("status", run_file, "--json")
    assert done.exit_code == 0, done.output
    return {stage["stage"]: stage for stage in json.loads(done.stdout)["stages"]}


def text(run_file: str) -> str:
    done = decant("status", run_file)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def run(run_of: Callable[..., RunConfig]) -> RunConfig:
    return run_of()


@pytest.fixture
def prepared(run: RunConfig) -> RunConfig:
    run_stage(open_store(run), prepare.stage(run))
    return run


def test_nothing_has_begun_and_the_data_and_teacher_are_elsewhere(run: RunConfig, tmp_path: Path) -> None:
    gone = {"teacher": {"path": "/nowhere"}, "prepare": {"data": "/nowhere.json"}}
    path = file_of(RunConfig.model_validate({**run.model_dump(mode="json"), **gone}), tmp_path)
    assert {name: stage["state"] for name, stage in seen(path).items()} == dict.fromkeys(NAMES, "not begun")
    assert not Path(run.store.url).exists()


def test_finished_stages_show_their_figures(run: RunConfig, tmp_path: Path) -> None:
    make_cache(run)
    path = file_of(run, tmp_path)
    found = seen(path)
    assert found["prepare"]["state"] == found["cache"]["state"] == "done"
    assert (found["prepare"]["shards"]["done"], found["prepare"]["shards"]["pending"]) == (10, 0)
    assert found["prepare"]["result"]["samples"] == 40
    assert re.search(r"^prepare +done +40 samples, 10 shards, [\d.]+ kB, in \d+ s", text(path), re.M)


def test_a_stage_that_ends_while_it_is_looked_at_is_done(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    store, ref = open_store(run), run.ref("prepare")
    begin(store, ref, None)
    looks = []

    def late(*arguments: Any) -> Any:
        looks.append(arguments)
        if len(looks) == 1:
            run_stage(store, prepare.stage(run))
        return facts(*arguments)

    monkeypatch.setattr(observe, "facts", late)
    assert observe.observe(store, ref).state == "done"
    assert len(looks) == 1


def test_a_store_that_gives_no_answer_is_an_error(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    store, ref = open_store(run), run.ref("prepare")
    begin(store, ref, "job")

    def broken(_: str) -> bytes:
        raise StoreUnavailable("no answer")

    monkeypatch.setattr(store, "read", broken)
    with pytest.raises(StoreUnavailable, match="no answer"):
        observe.observe(store, ref)


def half_cached(run: RunConfig, *, error: Exception | None = None) -> Store:
    """A cache of ten shards with three, of which the last command made two, in two seconds; one began twice."""
    store, ref = open_store(run), run.ref("cache")
    store.write(f"{ref}/{shard_name(0)}", b"x")
    os.utime(store.path(f"{ref}/{shard_name(0)}"), (1, 1))

    def work(store: Store, fingerprint: str, journal: Journal) -> dict[str, Any]:
        journal.note("todo", shards=10)
        worker = Attempts(journal, 3, 1)
        for index in (1, 2, 3, 3, 4):
            worker.begin(index)
        for index, ago in ((1, 0.0), (2, -2.0)):
            name = f"{ref}/{shard_name(index)}"
            store.write(name, b"x")
            now = time.time() - ago
            os.utime(store.path(name), (now, now))
        raise error or SystemExit

    with pytest.raises(type(error) if error else SystemExit):
        run_stage(store, Stage(ref, (run.ref("prepare"),), {}, work))
    return store


def forget_the_end(store: Store, ref: ArtifactRef) -> None:
    """As if the command had been killed, or still ran."""
    for path in Path(store.path(str(ref)), "journal").glob("*/*_stopped_*"):
        path.unlink()


def test_running_stage_shows_shards_rate_time_left_and_its_sign_of_life(prepared: RunConfig, tmp_path: Path) -> None:
    store = half_cached(prepared)
    forget_the_end(store, prepared.ref("cache"))
    path = file_of(prepared, tmp_path)
    cache = seen(path)["cache"]
    assert cache["state"] == "running"
    shards = cache["shards"]
    assert (shards["done"], shards["total"], shards["pending"], shards["failed"]) == (3, 10, 6, [3])
    assert (shards["samples"], shards["of_samples"], shards["again"]) == (12, 40, 1)
    assert shards["rate"] == pytest.approx(0.5, rel=0.1), "two commits, two seconds apart; the one from before is none"
    assert shards["seconds_left"] == pytest.approx(14.0, rel=0.1)
    assert (cache["workers"], cache["commands"], cache["error"]) == (1, 1, None)
    shown = text(path)
    assert "3 of 10 shards, 12 of 40 samples, 2.0 samples/s, 14 s left" in shown
    assert "1 failed: 3" in shown
    assert "1 shards begun again" in shown
    assert re.search(r"last sign of life \d s ago", shown)


def test_killed_command_is_told_by_its_silence(
    prepared: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_the_end(half_cached(prepared), prepared.ref("cache"))
    later = time.time() + 720
    monkeypatch.setattr(observe.time, "time", lambda: later)
    path = file_of(prepared, tmp_path)
    assert seen(path)["cache"]["state"] == "stopped"
    assert "no sign of life for 12 min; the same command goes on with what is missing" in text(path)


def test_command_that_was_stopped_or_failed_says_so_at_once(prepared: RunConfig, tmp_path: Path) -> None:
    half_cached(prepared)
    path = file_of(prepared, tmp_path)
    assert seen(path)["cache"]["state"] == "stopped"
    assert "stopped by hand; the same command goes on" in text(path)
    message = f"{prepared.store.url}/cache/tiny@1/shard-000004.parquet: [was] begun too often"
    half_cached(prepared, error=WorkersLost(message))
    cache = seen(path)["cache"]
    assert (cache["state"], cache["commands"], cache["error"]) == ("failed", 2, f"WorkersLost: {message}")
    assert cache["shards"]["failed"] == [3, 4], "one that was begun again, and the one that the error names"
    assert "begun too often" in text(path)


def test_training_shows_steps_losses_speed_and_checkpoint(run: RunConfig, tmp_path: Path) -> None:
    store, ref = open_store(run), run.ref("distill")
    journal = begin(store, ref, "raysubmit_1")
    journal.note("worker")
    journal.note("lost", reason="a node went away")
    store.write(f"{ref}/{LOG}", "".join(json.dumps({**ENTRY, "done": n}) + "\n" for n in (70, 80)).encode())
    store.write(f"{ref}/{CHECKPOINTS}/phase-00-step-00000050.safetensors", b"x")
    store.write(f"{ref}/{CHECKPOINTS}/phase-01-step-00000020.safetensors", b"x")
    path = file_of(run, tmp_path)
    distill = seen(path)["distill"]
    training = distill["training"]
    assert (distill["state"], distill["lost"], distill["job"]) == ("running", 1, "raysubmit_1")
    assert (training["done"], training["total"], training["phase"], training["kind"]) == (80, 150, 1, "distill")
    assert training["losses"] == {"loss": 1.5, "kl": 1.25, "ce": 2.0, "layer": 0.5}
    assert training["seconds_left"] == 140
    assert training["checkpoint"] == "phase-01-step-00000020"
    shown = text(path)
    assert "step 80 of 150, 2 min left" in shown
    assert "phase 2 (distill), its step 30 of 100" in shown
    assert "loss 1.5, kl 1.25, ce 2, layer 0.5; 1,234 tokens/s" in shown
    assert "1 worker groups lost" in shown
    assert "job raysubmit_1" in shown


def test_record_that_cannot_be_read_is_a_failure_of_that_stage_alone(prepared: RunConfig, tmp_path: Path) -> None:
    open_store(prepared).write(prepared.ref("cache").record_path, b"{")
    found = seen(file_of(prepared, tmp_path))
    assert (found["prepare"]["state"], found["cache"]["state"]) == ("done", "failed")
    assert "is not a record" in found["cache"]["error"]


def test_lines_are_no_wider_than_a_terminal(prepared: RunConfig, tmp_path: Path) -> None:
    half_cached(prepared, error=WorkersLost("word " * 60))
    code = f"from jobs.cli import app; app(['status', {file_of(prepared, tmp_path)!r}])"
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert max(map(len, done.stdout.splitlines()[1:])) <= 80, "but for the first, which is the store's path"


def test_a_look_imports_no_framework(prepared: RunConfig, tmp_path: Path) -> None:
    half_cached(prepared)
    path = file_of(prepared, tmp_path)
    code = (
        f"import sys; from jobs.cli import app; app(['status', {path!r}], standalone_mode=False);"
        f"print(sorted({FRAMEWORKS!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_watching_ends_when_all_is_done(run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, naps = open_store(run), iter(NAMES)

    def finish_one(seconds: float) -> None:
        assert seconds == 0.5
        name = next(naps)
        result = {
            "evaluate": {
                w: {"exact_match": {"overall": {"value": 0.5}}, "held_out_kl": 0.1} for w in ("teacher", "student")
            }
        }
        run_stage(store, Stage(run.ref(name), (), {}, lambda *_: result.get(name, {})))

    monkeypatch.setattr(jobs.status.time, "sleep", finish_one)
    done = decant("status", file_of(run, tmp_path), "--json", "--watch", "0.5")
    assert done.exit_code == 0, done.output
    looks = [[s["state"] for s in json.loads(line)["stages"]] for line in done.stdout.splitlines()]
    assert [look.count("done") for look in looks] == [0, 1, 2, 3, 4, 5]


def test_watching_ends_with_the_users_patience(run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs.status.time, "sleep", interrupt)
    assert decant("status", file_of(run, tmp_path), "--watch", "1").exit_code == 0


def test_a_stage_that_runs_in_another_process_is_seen_to(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["prepare"]["shard_rows"] = 1
    run = RunConfig.model_validate(settings)
    path, states = file_of(run, tmp_path), []
    (tmp_path / "other").mkdir()
    with started("prepare", run.model_dump(mode="json"), tmp_path / "other") as process:

        def done() -> bool:
            found = seen(path)["prepare"]
            states.append((found["state"], found["shards"] and (found["shards"]["done"], found["shards"]["total"])))
            return bool(found["state"] == "done")

        assert wait_until(done, process, "the end") or seen(path)["prepare"]["state"] == "done"
    running = [shards for state, shards in states if state == "running"]
    assert {state for state, _ in states} <= {"not begun", "running", "done"}, "it is never taken for dead or failed"
    assert any(shards and shards[1] == 40 and 0 < shards[0] < 40 for shards in running), states


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "s3" / "bucket").mkdir(parents=True)
    with rclone(tmp_path / "s3") as endpoint:
        for name, value in {"ENDPOINT_URL": endpoint, "ACCESS_KEY_ID": KEY, "SECRET_ACCESS_KEY": SECRET}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "WHEN_REQUIRED")
        s3fs.S3FileSystem.clear_instance_cache()
        yield
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.usefixtures("s3")
def test_on_s3_a_look_reads_no_shard_and_lists_a_stage_once(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run.model_copy(update={"store": run.store.model_copy(update={"url": "s3://bucket/store"})})
    store, ref = open_store(run), run.ref("prepare")
    journal = begin(store, ref, None)
    journal.note("todo", shards=50)
    worker = Attempts(journal, 3, 1)
    for index in range(20):
        worker.begin(index)
        store.write(f"{ref}/{shard_name(index)}", b"x")
    lists, reads = [], []
    listing, read = Store.listing, Store.read
    monkeypatch.setattr(Store, "listing", lambda self, name: lists.append(name) or listing(self, name))
    monkeypatch.setattr(Store, "read", lambda self, name: reads.append(name) or read(self, name))
    found = seen(file_of(run, tmp_path))["prepare"]
    assert found["state"] == "running"
    assert (found["shards"]["done"], found["shards"]["total"]) == (20, 50)
    assert found["silent"] < 60, "the server's clock is this machine's"
    assert lists == [str(run.ref(name)) for name in NAMES]
    assert len(reads) <= 2
    assert not [name for name in reads if "shard" in name]
