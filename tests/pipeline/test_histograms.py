"""Histograms count every value once; what a store holds is found whatever its state."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline import inventory
from pipeline.histograms import BINS, histogram, histograms
from pipeline.inventory import artifacts, entry, shards_of, spread
from pipeline.shards import read_manifest, write_shard
from pipeline.store import Store
from schemas.artifacts import ArtifactRef
from schemas.config import RunConfig
from schemas.errors import ArtifactDrift, ShardCorrupt
from schemas.manifest import shard_name
from schemas.tables import SAMPLES, targets_table
from tests.conftest import tiny_settings
from tests.pipeline.test_training import make_cache


@pytest.fixture(scope="module")
def run(tiny_teacher: Path, scenes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    found = RunConfig.model_validate(tiny_settings(tiny_teacher, scenes_folder, tmp_path_factory.mktemp("h") / "store"))
    make_cache(found)
    return found


@pytest.mark.parametrize("seed", range(40))
def test_every_value_is_counted_once_in_its_bin(seed: int) -> None:
    chance = np.random.default_rng(seed)
    whole = seed % 2 == 0
    spread_of = 10.0 ** chance.integers(-3, 5)
    values = chance.normal(chance.normal() * 10, spread_of, chance.integers(1, 300))
    values = np.round(values) if whole else values.astype(np.float16).astype(float)
    found = histogram("x", Counter(values.tolist()), whole=whole)
    assert 1 <= len(found.counts) <= BINS + 1
    edges = np.array(found.edges)
    assert np.allclose(np.diff(edges), edges[1] - edges[0])
    for low, high, count in zip(edges, edges[1:], found.counts, strict=False):
        inside = (values >= low - 1e-9) & (values < high - 1e-9)
        if not whole and high == edges[-1]:
            inside |= values >= high - 1e-9
        assert inside.sum() == count
    assert found.total == len(values)
    assert (found.smallest, found.largest) == (values.min(), values.max())
    assert found.median == np.sort(values)[(len(values) - 1) // 2]


def test_counts_stand_at_round_edges() -> None:
    found = histogram("x", Counter({3: 2, 40: 1, 99: 5}), whole=True)
    assert found.edges == (0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
    assert found.counts == (2, 0, 0, 0, 1, 0, 0, 0, 0, 5)
    alone = histogram("x", Counter({0.0: 7}), whole=False)
    assert (alone.edges, alone.counts) == ((0, 1), (7,))


def test_histograms_of_a_cache_count_every_row_and_position(run: RunConfig) -> None:
    store, table = Store(run.store.url), targets_table(run.cache, (0,))
    shards = read_manifest(store, run.ref("cache")).shards
    samples, unique, entropy, gold = histograms(store, run.ref("cache"), table, shards)
    rows = [r for s in shards for r in pq.read_table(store.path(f"{run.ref('cache')}/{s.name}")).to_pylist()]
    positions = sum(r["positions"] for r in rows)
    assert (samples.total, len(rows)) == (40, 40)
    assert unique.total == entropy.total == gold.total == positions
    assert max(b for r in rows for b in r["n_unique"]) == unique.largest
    assert gold.largest <= 0 <= entropy.smallest
    tokens, responses = histograms(store, run.ref("prepare"), SAMPLES, read_manifest(store, run.ref("prepare")).shards)
    assert tokens.total == responses.total == 40


def test_values_that_are_no_numbers_are_named(run: RunConfig, tmp_path: Path) -> None:
    ref, table = run.ref("cache"), targets_table(run.cache, (0,))
    info = read_manifest(Store(run.store.url), ref).shards[0]
    rows = pq.read_table(Store(run.store.url).path(f"{ref}/{info.name}")).to_pydict()
    rows["entropy"][0] = np.full(rows["positions"][0], np.nan, "<f2").tobytes()
    wrong = Store(str(tmp_path))
    write_shard(wrong, ref, table, 0, rows, "f")
    with pytest.raises(ShardCorrupt, match=r"shard-000000\.parquet: column entropy has values that are no numbers"):
        histograms(wrong, ref, table, [info])


def test_columns_are_the_files_but_for_footers(run: RunConfig) -> None:
    store, ref = Store(run.store.url), run.ref("cache")
    found = shards_of(store, ref, targets_table(run.cache, (0,)))
    files = [store.path(f"{ref}/{shard_name(i)}") for i in range(10)]
    # each file begins and ends with four letters; the footer's length stands before the last
    footers = sum(pq.read_metadata(file).serialized_size + 12 for file in files)
    assert sum(found.columns.values()) + footers == sum(Path(file).stat().st_size for file in files)
    assert found.read == found.all


def test_large_artifacts_are_sampled_evenly(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert spread(range(10), 3) == [0, 3, 6]
    assert spread(range(3), 3) == [0, 1, 2]
    store, ref, table = Store(run.store.url), run.ref("cache"), targets_table(run.cache, (0,))
    whole = shards_of(store, ref, table).columns["ids"]
    monkeypatch.setattr(inventory, "SHARDS_READ", 5)
    found = shards_of(store, ref, table)
    assert [s.index for s in found.read] == [0, 2, 4, 6, 8]
    assert len(found.all) == 10
    # shards of four samples differ by a few of their answers' tokens
    assert found.columns["ids"] == pytest.approx(whole, rel=0.5)


def test_another_version_of_the_table_is_refused_by_name(run: RunConfig) -> None:
    with pytest.raises(ArtifactDrift, match="expected table samples version 2, got targets version 2"):
        shards_of(Store(run.store.url), run.ref("cache"), SAMPLES)


def test_store_is_listed_with_what_is_unfinished_and_damaged(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert artifacts(store, ("prepare", "cache")) == []
    for name in ("cache/b@2/identity.json", "cache/b@10/shard-000003.parquet", "prepare/a@1/record.json", "cache/x"):
        store.write(name, b"{}")
    (tmp_path / "cache" / "b@2" / ".tmp-0").write_bytes(b"half a shard")
    found = artifacts(store, ("prepare", "cache"))
    assert [str(ref) for ref in found] == ["prepare/a@1", "cache/b@2", "cache/b@10"]
    assert [entry(store, ref).state for ref in found] == ["damaged", "unfinished", "unfinished"]
    assert entry(store, found[1]).files == {"identity.json": 2}
    assert (entry(store, found[2]).shards, entry(store, found[2]).rows) == (1, None)
    assert entry(store, ArtifactRef("cache", "c", 1)).state == "not made"


def test_damaged_manifest_is_a_state_of_the_listing(run: RunConfig) -> None:
    path = Path(run.store.url) / str(run.ref("cache")) / "manifest.json"
    data = path.read_bytes()
    assert (
        entry(Store(run.store.url), run.ref("cache")).state,
        entry(Store(run.store.url), run.ref("cache")).rows,
    ) == (
        "done",
        40,
    )
    path.write_bytes(data[:-10])
    try:
        assert entry(Store(run.store.url), run.ref("cache")).state == "damaged"
        with pytest.raises(ShardCorrupt, match=r"manifest\.json: is not a manifest"):
            read_manifest(Store(run.store.url), run.ref("cache"))
    finally:
        path.write_bytes(data)
