"""Whatever is not as it was written is found, by name; and only that is made again."""

import io
import random
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from jobs.inspect import verify_run
from pipeline.shards import fold_manifest, read_manifest, uncommitted, write_shard
from pipeline.stage import read_record, run_stage
from pipeline.store import Store
from pipeline.verify import verify
from schemas.artifacts import ArtifactRef
from schemas.config import RunConfig
from schemas.errors import ShardCorrupt
from schemas.tables import targets_table
from tests.conftest import tiny_settings
from tests.pipeline.test_training import make_cache

QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def run(tiny_teacher: Path, scenes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished cache with float8 taps and vision features, in a store that each test leaves as it was."""
    settings = tiny_settings(tiny_teacher, scenes_folder, tmp_path_factory.mktemp("verify") / "store")
    taps = {"layers": "replaced", "fraction": 0.5, "dtype": "fp8_e4m3"}
    settings["cache"] = {"taps": taps, "vision": "bfloat16"}
    found = RunConfig.model_validate(settings)
    make_cache(found)
    return found


def objects(run: RunConfig) -> list[Path]:
    return sorted(p for p in Path(run.store.url).rglob("*") if p.is_file())


def test_sound_artifacts_have_no_problems(run: RunConfig) -> None:
    out = io.StringIO()
    verify_run(run, Console(file=out, width=200), repair=False)
    assert out.getvalue().count("is as it was written") == 2


def test_every_flipped_byte_is_found_and_its_object_named(run: RunConfig) -> None:
    chance, paths = random.Random(0), objects(run)
    hit: set[str] = set()
    for number in range(100):
        path = paths[number % len(paths)]
        original = path.read_bytes()
        data = bytearray(original)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        try:
            with pytest.raises(ShardCorrupt) as caught:
                verify_run(run, QUIET, repair=False)
            assert str(path) in str(caught.value), "names the damaged object"
        finally:
            path.write_bytes(original)
        hit.add(path.name)
    assert {"record.json", "identity.json", "manifest.json", "shard-000000.parquet", "rejects.parquet"} <= hit
    verify_run(run, QUIET, repair=False)


def test_damage_in_several_artifacts_is_found_in_one_go(run: RunConfig) -> None:
    victims = [Path(run.store.url) / str(run.ref(kind)) / "shard-000000.parquet" for kind in ("prepare", "cache")]
    originals = [path.read_bytes() for path in victims]
    for path, data in zip(victims, originals, strict=True):
        path.write_bytes(data[:100])
    try:
        with pytest.raises(ShardCorrupt, match="2 objects are damaged") as caught:
            verify_run(run, QUIET, repair=False)
        assert all(str(path) in str(caught.value) for path in victims)
    finally:
        for path, data in zip(victims, originals, strict=True):
            path.write_bytes(data)


def test_missing_and_strange_objects_are_found(run: RunConfig) -> None:
    folder = Path(run.store.url) / str(run.ref("cache"))
    victim, stray = folder / "shard-000001.parquet", folder / "shard-000099.parquet"
    data = victim.read_bytes()
    stray.write_bytes(victim.read_bytes())
    victim.unlink()
    try:
        with pytest.raises(ShardCorrupt, match=r"2 objects are damaged") as caught:
            verify_run(run, QUIET, repair=False)
        assert f"{victim}: is missing" in str(caught.value)
        assert f"{stray}: is no part of the artifact" in str(caught.value)
    finally:
        victim.write_bytes(data)
        stray.unlink()


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("sample_id", "other", "its sample_ids are not those"),
        ("lse", np.array([np.nan], "<f4").tobytes(), "lse has 1 values|lse has values out of range"),
        ("counts", b"\x01", "counts and n_unique do not fit|counts do not sum to 50"),
        ("ids", np.array([60000], "<u2").tobytes(), "ids are beyond the vocabulary"),
        ("tap_0_input", b"123", "tap_0_input has 3 bytes"),
        ("vision", b"123", "vision has 3 bytes for 64 patches"),
        ("vision", b"\xff" * 4096, "vision has values that are no finite numbers"),
        ("patches", 0, "vision and its number of patches (0) do not fit"),
    ],
)
def test_wrong_values_under_right_digests_are_found(
    run: RunConfig, tmp_path: Path, column: str, value: Any, says: str
) -> None:
    """What a faulty writer would leave: every digest agrees, the values do not make sense."""
    store, ref = Store(run.store.url), run.ref("cache")
    table = targets_table(run.cache, (0,))
    rows = pq.read_table(store.path(f"{ref}/shard-000000.parquet")).to_pydict()
    place = next(i for i, v in enumerate(rows[column]) if v is not None)
    rows[column][place] = value
    wrong = Store(str(tmp_path))
    other = ArtifactRef("cache", "wrong", 1)
    write_shard(wrong, other, table, 0, rows, "f")
    fold_manifest(wrong, other, table, 1, "f")
    from pipeline.stage import Stage
    from pipeline.verify import targets_check

    run_stage(wrong, Stage(other, (), {}, lambda *_: {}))
    check = targets_check(store, run.ref("prepare"), run.cache, 81)
    (problem, *_) = verify(wrong, other, table, check)
    assert problem.name == "shard-000000.parquet"
    assert any(part in problem.what for part in says.split("|"))


def test_repair_leaves_just_the_damaged_shard_to_be_made_again(run: RunConfig) -> None:
    store, ref = Store(run.store.url), run.ref("cache")
    before = {p: p.read_bytes() for p in objects(run) if "cache" in str(p)}
    times = {p: p.stat().st_mtime_ns for p in before}
    victim = Path(store.path(f"{ref}/shard-000001.parquet"))
    victim.write_bytes(b"broken")
    with pytest.raises(ShardCorrupt, match="1 objects are damaged"):
        verify_run(run, QUIET, repair=True)
    count = len(read_manifest(store, run.ref("prepare")).shards)
    assert read_record(store, ref) is None
    assert uncommitted(store, ref, count) == [1]
    make_cache(run)
    for path, data in before.items():
        if path.name.startswith("shard-"):
            assert path.read_bytes() == data
            assert (path.stat().st_mtime_ns == times[path]) == (path != victim)
    verify_run(run, QUIET, repair=False)


def test_other_readers_see_plain_types(run: RunConfig) -> None:
    shard = Store(run.store.url).path(f"{run.ref('cache')}/shard-000000.parquet")
    plain = {"VARCHAR", "INTEGER", "BIGINT", "BLOB"}
    described = duckdb.sql(f"describe select * from '{shard}'").fetchall()
    assert {name for name, *_ in described} == set(pq.read_schema(shard).names)
    assert {kind for _, kind, *_ in described} <= plain
    rows = pq.read_table(shard).to_pylist()
    found = duckdb.sql(f"select sample_id, positions, counts, tap_0_input from '{shard}'").fetchall()
    assert found == [(r["sample_id"], r["positions"], r["counts"], r["tap_0_input"]) for r in rows]
    total = duckdb.sql(f"select sum(octet_length(n_unique)) from '{shard}'").fetchall()
    assert total == [(sum(r["positions"] for r in rows),)]
