"""Every form that data have on disk: what is read of it, what it is told by, and what is refused."""

import hashlib
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.conversations import part_conversations, read_conversations
from pipeline.data.records import data_digest, parts, read_part
from pipeline.store import Store
from schemas.errors import SampleInvalid
from tests.pipeline.test_records import written

SAID = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "red"}]
ROWS = [{"id": str(i), "image": {"bytes": bytes([i]), "path": f"{i}.png"}, "conversations": SAID} for i in range(23)]
LISTED = [{**row, "image": f"{row['id']}.png"} for row in ROWS]


def saved_dataset(folder: Path, rows: list[dict[str, Any]], files: int, batch: int) -> None:
    """What ``Dataset.save_to_disk`` of Hugging Face's datasets 5.2 writes: Arrow streams, their names and features."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{files:05}.arrow" for i in range(files)]
    each = -(-len(rows) // files)
    schema = pa.Table.from_pylist(rows).schema.with_metadata({"huggingface": "{}"})
    for i, name in enumerate(names):
        part = pa.Table.from_pylist(rows[i * each : (i + 1) * each], schema)
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
            stream.write_table(part, max_chunksize=batch)
    state = {"_data_files": [{"filename": n} for n in names], "_fingerprint": "0", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))


def shard_folder(folder: Path, kind: str) -> None:
    """Shards in the order of their names, one of them empty, beside what is no shard."""
    folder.mkdir()
    for name, rows in (("a", ROWS[:9]), ("b", []), ("c", ROWS[9:])):
        if kind == "jsonl":
            listed = LISTED[:9] if name == "a" else LISTED[9:] if name == "c" else []
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in listed))
        else:
            table = pa.Table.from_pylist(rows, pa.Table.from_pylist(ROWS).schema)
            pq.write_table(table, folder / f"{name}.parquet", row_group_size=4)
    (folder / "README.md").write_text("what it is")
    (folder / "dataset_infos.json").write_text("{}")


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same 23 records as every kind of data."""
    folder = tmp_path_factory.mktemp("forms")
    written(folder, "json", LISTED)
    written(folder, "jsonl", LISTED)
    written(folder, "parquet", ROWS)
    shard_folder(folder / "lines", "jsonl")
    shard_folder(folder / "tables", "parquet")
    saved_dataset(folder / "saved", ROWS, 2, 5)
    names = ["data.json", "data.jsonl", "data.parquet", "lines", "tables/", "saved", "saved/data-00000-of-00002.arrow"]
    return {name: f"{folder}/{name}" for name in names}


@pytest.mark.parametrize("size", [1, 2, 5, 7, 100])
@pytest.mark.parametrize(
    "name", ["data.json", "data.jsonl", "data.parquet", "lines", "tables/", "saved", "saved/data-00000-of-00002.arrow"]
)
def test_every_form_of_data_holds_the_same_conversations_part_by_part(
    forms: dict[str, str], name: str, size: int
) -> None:
    found = parts(forms[name], size)
    assert all(part.count <= size for part in found)
    assert [part.first for part in found] == [sum(p.count for p in found[:i]) for i in range(len(found))]
    # from the last part to the first, so that none leans on the one before it
    said = [c for part in found[::-1] for c in part_conversations(forms[name], part)[::-1]][::-1]
    count = 12 if name.endswith(".arrow") else 23
    assert [c.record for c in said] == [str(i) for i in range(count)]
    assert {c.turns for c in said} == {next(read_conversations(forms["data.json"])).turns}
    texts = name in ("data.json", "data.jsonl", "lines")
    assert [c.images for c in said] == [(f"{i}.png" if texts else bytes([i]),) for i in range(count)]
    assert said == list(read_conversations(forms[name]))


def test_data_at_urls_are_read_as_on_disk(forms: dict[str, str]) -> None:
    store = Store("memory://forms")
    for name in ("lines", "tables", "saved"):
        folder = Path(forms["saved"]).parent / name
        for path in folder.iterdir():
            store.write(f"{name}/{path.name}", path.read_bytes())
        there, here = f"memory://forms/{name}", str(folder)
        assert parts(there, 4) == parts(here, 4)
        assert [read_part(there, p) for p in parts(there, 4)] == [read_part(here, p) for p in parts(here, 4)]
        assert data_digest(there) == data_digest(here)


def test_errors_of_a_folders_records_name_the_file_and_the_number_among_all(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n' * 3)
    (tmp_path / "b.jsonl").write_text('{"id": 1}\n{broken\n')
    (*_, last) = parts(str(tmp_path), 2)
    said = [str(item) for item in part_conversations(str(tmp_path), last)]
    assert said[0].startswith(f"{tmp_path}: b.jsonl: record 3 (id 1): conversations: expected a list")
    assert said[1].startswith(f"{tmp_path}: b.jsonl: record 4: cannot be read as JSON")


def test_digest_of_a_file_is_its_sha256_and_of_a_folder_that_of_names_and_contents(
    forms: dict[str, str], tmp_path: Path
) -> None:
    contents = Path(forms["data.json"]).read_bytes()
    assert data_digest(forms["data.json"]) == hashlib.sha256(contents).hexdigest()[:32]
    copy = tmp_path / "lines"
    shutil.copytree(forms["lines"], copy)
    digests = [data_digest(str(copy))]
    (copy / "README.md").write_text("no data")
    assert data_digest(str(copy)) == digests[0] == data_digest(forms["lines"])
    (copy / "c.jsonl").rename(copy / "d.jsonl")
    digests.append(data_digest(str(copy)))
    with (copy / "a.jsonl").open("a") as file:
        file.write("\n")
    digests.append(data_digest(str(copy)))
    assert len(set(digests)) == 3
    with pytest.raises(SampleInvalid, match="no such data file"):
        data_digest(str(tmp_path / "none.json"))


def test_folders_that_are_no_one_data_set_are_refused(tmp_path: Path) -> None:
    def says(folder: str) -> str:
        with pytest.raises(SampleInvalid) as caught:
            parts(str(tmp_path / folder), 4)
        assert str(tmp_path) in str(caught.value)
        return str(caught.value)

    for split in ("train", "test"):
        saved_dataset(tmp_path / "both" / split, ROWS, 1, 5)
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert "holds several data sets (test, train)" in says("both")
    (tmp_path / "mixed").mkdir()
    assert "nor a folder that holds any" in says("mixed")
    (tmp_path / "mixed" / "notes.txt").touch()
    assert "expected a folder of .parquet files or one of .jsonl files, found notes.txt" in says("mixed")
    for name in ("a.parquet", "b.jsonl"):
        (tmp_path / "mixed" / name).touch()
    assert "found a.parquet, b.jsonl" in says("mixed")
    for state in ("{}", "[", '{"_data_files": [{}]}', '{"_data_files": 3}', "[" * 5000):
        (tmp_path / "both/train/state.json").write_text(state)
        assert "state.json: " in says("both/train")
    (tmp_path / "both/train/state.json").write_text('{"_data_files": [{"filename": "../test/data-0.arrow"}]}')
    assert "expected names of .arrow files beside it" in says("both/train")


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "arrow"])
def test_a_record_with_broken_text_leaves_the_others_readable(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"data.{kind}"
    if kind in ("json", "jsonl"):
        lines = [b'{"id": "a"}', b'{"id": "\xff"}', b'{"id": "c"}']
        path.write_bytes(b"[%s]" % b",\n".join(lines) if kind == "json" else b"\n".join(lines))
    else:
        cells = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
        table = pa.table({"id": cells})
        if kind == "parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_stream(str(path), table.schema) as stream:
                stream.write_table(table)
    (part,) = parts(str(path), 10)
    first, broken, last = read_part(str(path), part)
    assert (first, last) == ({"id": "a"}, {"id": "c"})
    assert isinstance(broken, SampleInvalid)
    assert str(broken).startswith(f"{path}: record 1: cannot be read")


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "arrow"])
def test_broken_files_are_refused_and_said_to_be_so(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "saved" / "data-00000-of-00001.arrow"
    saved_dataset(source.parent, ROWS, 1, 5)
    data = source.read_bytes() if kind == "arrow" else Path(written(tmp_path, kind, LISTED)).read_bytes()
    path = tmp_path / f"broken.{kind}"
    for broken in (data[: len(data) // 2], b"\x00" * 100, data[:3]):
        path.write_bytes(broken)
        with pytest.raises(SampleInvalid, match=rf"broken\.{kind}.*cannot be read|expected a JSON list") as caught:
            list(read_conversations(str(path)))
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables_that_changed_since_they_were_looked_through_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"data.{kind}"
    for rows in (ROWS, ROWS[:9]):
        table = pa.Table.from_pylist(rows)
        if kind == "parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_stream(str(path), table.schema) as stream:
                stream.write_table(table, max_chunksize=5)
        if rows is ROWS:
            found = parts(str(path), 12)
    with pytest.raises(SampleInvalid, match=r"expected 12 records from number 0 on, got 9.*run the command again"):
        read_part(str(path), found[0])


def test_numbers_and_brackets_by_the_thousand_are_refused(tmp_path: Path) -> None:
    lines = ['{"id": "a"}', "[" * 10**5, "1" * 10**5, '{"id": "b"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (part,) = parts(str(tmp_path / "a.jsonl"), 10)
    kinds = [type(r).__name__ for r in read_part(str(tmp_path / "a.jsonl"), part)]
    assert kinds == ["dict", "SampleInvalid", "SampleInvalid", "dict"]
    for line in lines[1:3]:
        (tmp_path / "a.json").write_text(f"[{line}]")
        with pytest.raises(SampleInvalid, match="cannot be read as JSON: byte 1"):
            parts(str(tmp_path / "a.json"), 10)


def test_an_arrow_file_larger_than_memory_takes_little_of_it(tmp_path: Path) -> None:
    rows = [{"id": "x", "text": "y" * 10_000}] * 100
    path, table = tmp_path / "data.arrow", pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        for _ in range(50):
            stream.write_table(table)
    tracemalloc.start()
    found = parts(str(path), 64)
    assert sum(p.count for p in found) == 5000
    assert len(read_part(str(path), found[-1])) == 5000 % 64
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 50e6
    assert peak < 10e6  # a few record batches of a megabyte, as Arrow's bytes and as values
