import io
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import pipeline.store
from pipeline.journal import Journal
from pipeline.shards import fold_manifest, read_manifest, read_shard, uncommitted, write_shard
from pipeline.stage import Stage, run_stage, status
from pipeline.store import Store
from schemas.artifacts import ArtifactRef
from schemas.errors import ArtifactDrift, ArtifactMissing, ShardCorrupt, StoreUnavailable
from schemas.tables import SAMPLES
from tests.flaky import FlakyFileSystem

REF = ArtifactRef("prepare", "x", 1)
GOLDEN = Path("tests/golden/shard.parquet")


def columns(rows: int = 2) -> dict[str, list[Any]]:
    return {
        "sample_id": [f"id{i}" for i in range(rows)],
        "record": [str(i) for i in range(rows)],
        "input_ids": [b"\1\0\0\0"] * rows,
        "spans": [b"\0\0\0\0\1\0\0\0"] * rows,
        "tokens": [1] * rows,
        "response_tokens": [1] * rows,
        "images": [b"" if i else b"png" for i in range(rows)],
        "image_bytes": [b"" if i else b"\3\0\0\0\0\0\0\0" for i in range(rows)],
    }


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def stage(calls: list[str], settings: dict[str, Any], *, fails: bool = False) -> Stage:
    def work(_: Store, fingerprint: str, __: Journal) -> dict[str, Any]:
        calls.append(fingerprint)
        if fails:
            raise RuntimeError("killed")
        return {"n": 1}

    return Stage(REF, (), settings, work)


def test_finished_stage_does_not_run_again(store: Store) -> None:
    calls: list[str] = []
    first, ran = run_stage(store, stage(calls, {"a": 1}))
    again, ran_again = run_stage(store, stage(calls, {"a": 1}))
    assert (ran, ran_again, len(calls)) == (True, False, 1)
    assert first == again


def test_interrupted_stage_runs_again_under_the_same_fingerprint(store: Store) -> None:
    calls: list[str] = []
    with pytest.raises(RuntimeError):
        run_stage(store, stage(calls, {"a": 1}, fails=True))
    assert status(store, stage(calls, {"a": 1})) == "partial"
    run_stage(store, stage(calls, {"a": 1}))
    assert calls[0] == calls[1]


@pytest.mark.parametrize("finished", [True, False])
def test_changed_setting_is_refused_by_field(store: Store, finished: bool) -> None:
    calls: list[str] = []
    if finished:
        run_stage(store, stage(calls, {"a": {"b": 1}, "c": 2}))
    else:
        with pytest.raises(RuntimeError):
            run_stage(store, stage(calls, {"a": {"b": 1}, "c": 2}, fails=True))
    with pytest.raises(ArtifactDrift) as caught:
        run_stage(store, stage(calls, {"a": {"b": 9}, "c": 2}))
    assert "settings.a.b: 1 -> 9" in str(caught.value)
    assert "x@2" in str(caught.value)
    assert "settings.c" not in str(caught.value)
    assert len(calls) == 1


def test_missing_input_names_the_command_that_makes_it(store: Store) -> None:
    later = Stage(ArtifactRef("cache", "x", 1), (REF,), {}, lambda *_: {})
    with pytest.raises(ArtifactMissing, match=r"prepare/x@1: does not exist; run `decant prepare RUN\.yaml` first"):
        run_stage(store, later)
    with pytest.raises(RuntimeError):
        run_stage(store, stage([], {}, fails=True))
    with pytest.raises(ArtifactMissing, match="is unfinished"):
        run_stage(store, later)


def test_a_changed_input_is_a_drift_of_what_was_made_from_it(store: Store) -> None:
    later = Stage(ArtifactRef("cache", "x", 1), (REF,), {}, lambda *_: {})
    run_stage(store, stage([], {"a": 1}))
    run_stage(store, later)
    store.fs.rm(store.path(str(REF)), recursive=True)
    run_stage(store, stage([], {"a": 2}))
    with pytest.raises(ArtifactDrift, match=r"inputs\.prepare/x@1"):
        run_stage(store, later)


def test_failed_write_leaves_nothing_behind(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    store.write("a/b", b"old")
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StoreUnavailable, match="No space left on device"):
        store.write("a/b", b"new")
    assert store.read("a/b") == b"old"
    assert [p.name for p in Path(store.path("a")).iterdir()] == ["b"]


def test_unwritable_store_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(str(tmp_path / "file" / "store"))
    with pytest.raises(StoreUnavailable, match=r"check that `store` .* is writable"):
        store.write("a", b"")


def test_same_rows_give_the_golden_shards_bytes(store: Store) -> None:
    write_shard(store, REF, SAMPLES, 0, columns(), "f" * 32)
    written = store.read(f"{REF}/shard-000000.parquet")
    golden = pq.read_table(GOLDEN)
    assert pq.read_table(io.BytesIO(written)).equals(golden)
    assert pq.read_schema(io.BytesIO(written)).metadata == golden.schema.metadata
    write_shard(store, REF, SAMPLES, 0, columns(), "f" * 32)
    assert store.read(f"{REF}/shard-000000.parquet") == written


def test_manifest_is_folded_from_footers(store: Store) -> None:
    for index in (1, 0):
        write_shard(store, REF, SAMPLES, index, columns(index + 1), "f")
    assert uncommitted(store, REF, 3) == [2]
    manifest = fold_manifest(store, REF, SAMPLES, 2, "f")
    assert manifest.shard_rows == (1, 2)
    assert read_manifest(store, REF) == manifest
    assert read_shard(store, REF, SAMPLES, manifest.shards[1])["record"].to_pylist() == ["0", "1"]


def test_corrupt_and_foreign_shards_are_refused_by_name(store: Store) -> None:
    write_shard(store, REF, SAMPLES, 0, columns(), "f")
    with pytest.raises(ShardCorrupt, match="footer `fingerprint`: expected other, got f"):
        fold_manifest(store, REF, SAMPLES, 1, "other")
    info = fold_manifest(store, REF, SAMPLES, 1, "f").shards[0]
    name = f"{REF}/{info.name}"
    data = store.read(name)
    store.write(name, data[: len(data) // 2])
    with pytest.raises(ShardCorrupt, match=r"shard-000000\.parquet: cannot be read as Parquet"):
        read_shard(store, REF, SAMPLES, info)
    write_shard(store, REF, SAMPLES, 0, {**columns(), "record": ["0", "changed"]}, "f")
    with pytest.raises(ShardCorrupt, match="do not match the checksum"):
        read_shard(store, REF, SAMPLES, info)
    write_shard(store, REF, SAMPLES, 0, columns(1), "f")
    with pytest.raises(ShardCorrupt, match="expected 2 rows, got 1"):
        read_shard(store, REF, SAMPLES, info)


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No waiting; the waits that there would have been."""
    waits: list[float] = []
    monkeypatch.setattr(pipeline.store.time, "sleep", waits.append)
    return waits


def test_store_that_fails_now_and_then_loses_nothing(patience: list[float]) -> None:
    FlakyFileSystem.start(rate=0.25, seed=1)
    store = Store("flaky:///bucket")
    for index in range(12):
        write_shard(store, REF, SAMPLES, index, columns(index + 1), "f")
    assert uncommitted(store, REF, 14) == [12, 13]
    manifest = fold_manifest(store, REF, SAMPLES, 12, "f")
    for info in read_manifest(store, REF).shards:
        assert read_shard(store, REF, SAMPLES, info).num_rows == info.index + 1
    assert manifest.rows == 78
    assert {"pipe_file", "cat_file", "open", "cut open"} <= set(FlakyFileSystem.failures)
    assert len(patience) >= 10
    assert max(patience) <= 16


def test_store_that_never_answers_ends_with_the_objects_name(patience: list[float]) -> None:
    FlakyFileSystem.start(rate=1.0)
    store = Store("flaky:///bucket")
    with pytest.raises(StoreUnavailable, match=r"bucket/a/b: no answer from the store in 6 attempts: .*run the same"):
        store.write("a/b", b"data")
    for asks in (store.read, store.exists, store.is_file):
        with pytest.raises(StoreUnavailable, match=r"bucket/a/b: no answer"):
            asks("a/b")
    assert len(patience) == 20
    assert 0.5 + 1 + 2 + 4 + 8 <= sum(patience[:5]) <= 31


def test_what_no_patience_changes_is_not_tried_again(patience: list[float]) -> None:
    FlakyFileSystem.start(rate=0.0)
    store = Store("flaky:///bucket")
    with pytest.raises(StoreUnavailable, match="cannot be read"):
        store.read("nothing/here")
    assert store.names("nowhere") == []
    write_shard(store, REF, SAMPLES, 0, columns(), "f")
    (info,) = fold_manifest(store, REF, SAMPLES, 1, "f").shards
    store.write(f"{REF}/{info.name}", b"not parquet, but as long as it says")
    with pytest.raises(ShardCorrupt, match="cannot be read as Parquet"):
        read_shard(store, REF, SAMPLES, info)
    assert patience == []


def test_what_a_lost_answer_already_removed_is_removed(patience: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    FlakyFileSystem.start(rate=0.0)
    store = Store("flaky:///bucket")
    store.write("a/b", b"data")
    really = store.fs.rm

    def loses_its_answer(path: str, recursive: bool) -> None:
        really(path, recursive=recursive)
        raise TimeoutError("timed out")

    monkeypatch.setattr(FlakyFileSystem, "rm", lambda _, path, recursive: loses_its_answer(path, recursive))
    store.remove("a")
    assert len(patience) == 1
    assert not store.exists("a/b")


def test_answers_cut_short_are_asked_for_again(patience: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    FlakyFileSystem.start(rate=0.0)
    store = Store("flaky:///bucket")
    store.write("x", b"0123456789")
    whole, cuts = store.fs.cat_file, iter([3, 9, 10])
    monkeypatch.setattr(FlakyFileSystem, "cat_file", lambda self, path: whole(path)[: next(cuts)])
    assert store.read("x") == b"0123456789"
    assert len(patience) == 2
