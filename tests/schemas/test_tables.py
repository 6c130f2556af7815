from pathlib import Path

import pyarrow as pa
import pytest

from schemas.canonical import canonical_json, differences, digest
from schemas.config import CacheConfig, FinalHiddenTargets, TapsConfig, TopKTargets
from schemas.errors import ShardCorrupt
from schemas.tables import REJECTS, SAMPLES, Table, targets_table

GOLDEN = Path("tests/golden/tables.txt")


def describe(table: Table) -> str:
    lines = [f"{table.name}@{table.version}"]
    lines += [f"  {c.name}: {c.type}{'?' if c.nullable else ''}  # {c.doc}" for c in table.columns]
    return "\n".join(lines) + "\n"


def golden() -> str:
    kinds = [
        CacheConfig(),
        CacheConfig(targets=TopKTargets(kind="top_k")),
        CacheConfig(
            targets=FinalHiddenTargets(kind="final_hidden", dtype="fp8_e4m3"), taps=TapsConfig(dtype="fp8_e4m3")
        ),
        CacheConfig(vision="bfloat16"),
    ]
    return describe(SAMPLES) + describe(REJECTS) + "".join(describe(targets_table(kind, (0, 4))) for kind in kinds)


def test_table_schemas_are_the_golden_file() -> None:
    assert golden() == GOLDEN.read_text()


def test_table_refuses_unknown_wrong_and_empty_columns() -> None:
    good = pa.table({"sample_id": ["a"], "positions": pa.array([1], pa.int32())})
    targets_table(CacheConfig(), ()).check(good, "here")
    for bad in (
        good.append_column("more", pa.array([1])),
        pa.table({"positions": pa.array([1], pa.int64())}),
        pa.table({"sample_id": pa.array([None], pa.string())}),
    ):
        with pytest.raises(ShardCorrupt, match="here: column"):
            targets_table(CacheConfig(), ()).check(bad, "here")


def test_equal_values_have_equal_digests_and_differences_name_the_field() -> None:
    old, new = {"a": {"b": 1, "c": [1, 2]}, "d": "é"}, {"d": "é", "a": {"c": [1, 3], "b": 1}}
    assert digest(old) == digest({"d": "é", "a": {"c": [1, 2], "b": 1}})
    assert canonical_json(old) != canonical_json(new)
    assert differences(old, new) == ["a.c: [1, 2] -> [1, 3]"]
    assert differences({"x": 1}, {}) == ['x: 1 -> "(absent)"']
