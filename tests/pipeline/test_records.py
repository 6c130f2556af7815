import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import texts
from pipeline.data.records import parts, read_part
from schemas.errors import SampleInvalid, StoreUnavailable

AWKWARD: list[Any] = [
    {"id": "]}", "text": 'a "quoted" \\ [{,', "more": [[1, 2], {"a": {}}]},
    {"id": "ü", "text": "日本語 \x7f \u0085 \U0001f600"},
    {},
    {"id": "long", "text": "x" * 500},
    [1, 2],
    7,
    -12.5e10,
    {"id": None},
]


def written(folder: Path, kind: str, rows: list[Any], **style: Any) -> str:
    path = folder / f"data.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    elif kind == "jsonl":
        path.write_text("\n\n".join(json.dumps(r, **style) for r in rows) + "\n\n", encoding="utf-8")
    else:
        path.write_text(json.dumps(rows, **style), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("kind", ["json", "jsonl"])
@pytest.mark.parametrize("style", [{}, {"indent": 1, "ensure_ascii": False}])
def test_parts_hold_every_record_once(
    tmp_path: Path, kind: str, size: int, chunk: int, style: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "CHUNK", chunk)
    path = written(tmp_path, kind, AWKWARD, **({} if kind == "jsonl" else style))
    found = parts(path, size)
    assert [p.first for p in found] == list(range(0, len(AWKWARD), size))
    assert [p.count for p in found] == [min(size, len(AWKWARD) - p.first) for p in found]
    assert [r for p in found for r in read_part(path, p)] == AWKWARD


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_parts_of_parquet_cross_row_groups(tmp_path: Path, size: int) -> None:
    rows = [{"id": i, "conversations": "[]", "image": None} for i in range(10)]
    path = written(tmp_path, "parquet", rows)
    found = parts(path, size)
    assert sum(p.count for p in found) == 10
    assert [r["id"] for p in found for r in read_part(path, p)] == list(range(10))


def test_byte_order_mark_is_no_part_of_the_list(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(AWKWARD), encoding="utf-8-sig")
    (part,) = parts(str(path), 100)
    assert read_part(str(path), part) == AWKWARD


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[{"a": 1}, {"a": }]', "byte 17: Expecting value"),
        ('[{"a": 1} {"a": 2}]', "byte 10: expected a comma"),
        ('[{"a": 1}', "byte 9: expected a comma or the list's end"),
        ('[{"a": 1},]', "byte 10: Expecting value"),
        ('[{"a": "b]', "Unterminated string"),
        ('[{"a": 1}] x', "byte 11: there is more after"),
        ("  ", "expected a JSON list"),
    ],
)
def test_broken_lists_are_refused_by_byte(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(SampleInvalid, match=says):
        parts(str(path), 2)


def test_file_that_changed_since_it_was_looked_through_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "json", AWKWARD)
    (part,) = parts(path, 100)
    data = Path(path).read_bytes()
    Path(path).write_bytes(b"  " + data[:-2])
    with pytest.raises(SampleInvalid, match="cannot be read as JSON"):
        read_part(path, part)
    Path(path).write_bytes(data[:-20])
    with pytest.raises(StoreUnavailable, match="bytes came of"):
        read_part(path, part)


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_file_larger_than_memory_takes_little_of_it(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"data.{kind}"
    line = json.dumps({"id": "x", "text": "y" * 10_000})
    with path.open("w") as file:
        file.write("[" if kind == "json" else "")
        for i in range(3000):
            file.write(("," if i and kind == "json" else "") + line + "\n")
        file.write("]" if kind == "json" else "")
    tracemalloc.start()
    found = parts(str(path), 100)
    for part in found[:3]:
        assert len(read_part(str(path), part)) == 100
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 30
    assert path.stat().st_size > 30e6
    assert peak < 10e6  # one part as bytes, text and values, and chunks of a megabyte
