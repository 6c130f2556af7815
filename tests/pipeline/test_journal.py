"""The journal: any number of writers, any of which may die; a summary in the record, and nothing left beside it."""

import json
import random
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pipeline.journal
from pipeline.journal import Attempts, Journal, begin, commands, told
from pipeline.stage import Stage, run_stage
from pipeline.store import Store
from pipeline.verify import verify
from schemas.artifacts import ArtifactRef
from schemas.errors import ShardCorrupt, StoreUnavailable, WorkersLost
from schemas.manifest import shard_name
from tests.flaky import FlakyFileSystem
from tests.servers import KEY, SECRET, rclone

REF = ArtifactRef("cache", "x", 1)
BUCKET = "journal"


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    if request.param == "disk":
        yield Store(str(tmp_path / "store"))
        return
    import s3fs

    with rclone(tmp_path) as endpoint:
        for name, value in {"ENDPOINT_URL": endpoint, "ACCESS_KEY_ID": KEY, "SECRET_ACCESS_KEY": SECRET}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "WHEN_REQUIRED")
        (tmp_path / BUCKET).mkdir()
        s3fs.S3FileSystem.clear_instance_cache()
        yield Store(f"s3://{BUCKET}/store")
        s3fs.S3FileSystem.clear_instance_cache()


def stage(work: Any) -> Stage:
    return Stage(REF, (), {"a": 1}, work)


def history(store: Store) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(store.read(REF.record_path))["provenance"]["history"]
    return found


def test_what_went_wrong_is_in_the_record_and_nothing_else_is_left(store: Store) -> None:
    def fails(store: Store, fingerprint: str, journal: Journal) -> dict[str, Any]:
        Attempts(journal, 3, 1).begin(7)
        raise ShardCorrupt("shard 7 is broken\nsee there")

    def is_stopped(*_: object) -> dict[str, Any]:
        raise KeyboardInterrupt

    def succeeds(store: Store, fingerprint: str, journal: Journal) -> dict[str, Any]:
        worker = Attempts(journal, 3, 1)
        for index in (7, 8):
            worker.begin(index)
        journal.note("lost", reason="a node went away")
        store.write(f"{REF}/{shard_name(7)}", b"x")
        return {}

    with pytest.raises(ShardCorrupt):
        run_stage(store, stage(fails))
    with pytest.raises(KeyboardInterrupt):
        run_stage(store, stage(is_stopped))
    begin(store, REF, "a-job")  # and then killed
    run_stage(store, stage(succeeds))
    found = history(store)
    assert [c["outcome"] for c in found["commands"]] == ["failed", "stopped", "killed", "done"]
    assert [c["workers"] for c in found["commands"]] == [1, 0, 0, 1]
    assert found["commands"][0]["error"] == "ShardCorrupt: shard 7 is broken\nsee there"
    assert found["commands"][2]["job"] == "a-job"
    assert [fact["reason"] for fact in found["commands"][3]["lost"]] == ["a node went away"]
    assert found["shards_begun_again"] == {shard_name(7): 2}
    assert all(c["seconds"] >= 0 and len(c["hosts"]) == 1 for c in found["commands"])
    assert sorted(store.sizes(str(REF))) == ["identity.json", "record.json", shard_name(7)]
    assert verify(store, REF) == []


def test_a_journal_that_a_killed_command_left_beside_its_record_harms_nobody(store: Store) -> None:
    run_stage(store, stage(lambda *_: {}))
    record = store.read(REF.record_path)
    begin(store, REF, None).note("worker")
    assert verify(store, REF) == []
    assert not run_stage(store, stage(lambda *_: {}))[1]
    assert store.read(REF.record_path) == record
    assert sorted(store.sizes(str(REF))) == ["identity.json", "record.json"]


def test_writers_at_once_lose_nothing(store: Store) -> None:
    journal, writers, each = begin(store, REF, None), 8, 10

    def write(number: int) -> None:
        worker = Attempts(Journal(store, REF, journal.command), each, writers)
        for index in range(each):
            worker.begin(index)
        journal.note("lost", reason=str(number))

    threads = [threading.Thread(target=write, args=(n,)) for n in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (found,) = commands(store.sizes(str(REF)))
    assert found.attempts() == dict.fromkeys(range(each), writers)
    assert len(found.of("worker")) == len(found.of("lost")) == writers
    assert found.entries == journal.read().entries


@pytest.mark.parametrize("seed", range(3))
def test_however_workers_die_no_shard_is_begun_more_often_than_it_may_be(tmp_path: Path, seed: int) -> None:
    chance, store, retries, deadly = random.Random(seed), Store(str(tmp_path)), 2, 4
    journal, shards = begin(store, REF, None), 6

    def live_and_die() -> None:
        worker = Attempts(Journal(store, REF, journal.command), retries, 1)
        for index in range(shards):
            if not store.exists(f"{REF}/{shard_name(index)}"):
                worker.begin(index)
                if index == deadly or chance.random() < 0.1:
                    return
                store.write(f"{REF}/{shard_name(index)}", b"x")

    with pytest.raises(WorkersLost) as caught:
        deque(iter(live_and_die, "for ever"))
    attempts = journal.read().attempts()
    assert max(attempts.values()) == retries + 1
    assert any(f"{shard_name(i)}: was begun 3 times" in str(caught.value) for i, n in attempts.items() if n == 3)
    again = Attempts(begin(store, REF, None), retries, 1)
    again.begin(deadly)


def test_what_is_committed_may_be_begun_again_and_who_asks_for_no_limit_has_none(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    journal = begin(store, REF, None)
    store.write(f"{REF}/{shard_name(0)}", b"x")
    worker = Attempts(journal, 0, 1)
    for _ in range(3):  # what a lost node held of it is computed anew
        worker.begin(0)
    worker.begin(1)
    with pytest.raises(
        WorkersLost,
        match=r"shard-000001\.parquet: was begun 1 times by this command \(on [^)]*\) and never committed: ",
    ):
        worker.begin(1)
    before = store.sizes(str(REF))
    silent = Attempts(Journal(store, REF, None), 0, 1)
    for _ in range(3):
        silent.begin(1)
    assert store.sizes(str(REF)) == {**before}


def test_workers_that_begin_nothing_end_after_as_many_as_may_be(tmp_path: Path) -> None:
    journal = begin(Store(str(tmp_path)), REF, None)
    for _ in range(2 + 3):
        Attempts(journal, 3, 2)
    with pytest.raises(WorkersLost, match=r"cache/x@1: 5 workers \(on .*\) .*before they had begun a shard"):
        Attempts(journal, 3, 2)
    Attempts(begin(journal.store, REF, None), 0, 0)  # the command's own process is one as well


def test_a_command_that_works_in_silence_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.journal, "BEAT", 0.01)
    store = Store(str(tmp_path))
    journal, beats = begin(store, REF, None), set[float]()
    with journal.kept():
        while len(beats) < 3:
            beats.update(e.modified for name, e in store.listing(str(REF)).items() if name.endswith("/alive"))
    (found,) = commands(store.sizes(str(REF)))
    assert [entry.kind for entry in found.entries] == ["begun"], "a sign of life is no entry"


def test_a_stage_that_takes_back_all_it_had_begun_leaves_no_journal(tmp_path: Path) -> None:
    store = Store(str(tmp_path))

    def takes_back(store: Store, *_: object) -> dict[str, Any]:
        store.remove(str(REF))
        raise ShardCorrupt("of no use")

    with pytest.raises(ShardCorrupt):
        run_stage(store, stage(takes_back))
    assert store.sizes("cache") == {}


def test_a_store_that_fails_does_not_hide_what_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    FlakyFileSystem.start(rate=0.0)
    monkeypatch.setattr("pipeline.store.time.sleep", lambda _: None)
    store = Store("flaky:///bucket")

    def fails(*_: object) -> dict[str, Any]:
        FlakyFileSystem.start(rate=1.0)
        raise StoreUnavailable("the first error")

    with pytest.raises(StoreUnavailable, match=r"^the first error$"):
        run_stage(store, stage(fails))


def test_foreign_errors_are_told_by_type_and_first_line_and_our_own_whole() -> None:
    assert told(KeyError("x\ny")) == r"KeyError: 'x\ny'"
    assert told(RuntimeError("first\nsecond: secret")) == "RuntimeError: first"
    assert told(ShardCorrupt("one\ntwo")) == "ShardCorrupt: one\ntwo"
    assert len(told(RuntimeError("x" * 10_000))) == 2000


def test_a_writer_that_is_killed_leaves_whole_entries_only(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    journal = begin(store, REF, None)
    code = (
        "import itertools, sys; from pipeline.journal import Journal; from pipeline.store import Store;"
        "from schemas.artifacts import ArtifactRef;"
        f"journal = Journal(Store({str(tmp_path)!r}), ArtifactRef('cache', 'x', 1), {journal.command!r});"
        "print('ready', flush=True);"
        "[journal.note('lost', reason='r' * 1000) or journal.note('shard', i) for i in itertools.count()]"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        while len(journal.read().entries) < 50:
            pass
        process.kill()
    found = journal.read()
    reasons = pipeline.journal.facts(store, REF, found, "lost")
    assert {fact["reason"] for fact in reasons} == {"r" * 1000}
    shards = found.attempts()
    assert shards == dict.fromkeys(range(len(shards)), 1)
