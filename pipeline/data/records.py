"""Raw records of data files, part by part, so that data larger than memory are read by several workers.

Data are a file (a JSON list, JSON Lines, Parquet or an Arrow stream) or a folder: shards of Parquet or JSON Lines, in
the order of their names, or a data set as Hugging Face's ``datasets`` saves it. They lie on local disk or at a URL.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, TypeVar

import pyarrow as pa

from pipeline.data.tables import arrow_batches, arrow_rows, parquet_count, parquet_rows
from pipeline.data.texts import elements, line_values, lines, list_values
from pipeline.store import Store
from schemas.canonical import digest
from schemas.errors import SampleInvalid, StoreUnavailable, shown

T = TypeVar("T")
# What a file's name ends with; any other is read as JSON.
KINDS = {".parquet": "Parquet", ".jsonl": "JSON Lines", ".arrow": "Arrow"}
# What a folder's shards may be; metadata beside them are JSON, so JSON lists are no shards.
SHARDS = (".parquet", ".jsonl")


@dataclass(frozen=True)
class Part:
    """``count`` records from number ``first`` of all on, which one file holds.

    [start, stop) are bytes of a text or rows of a Parquet file. Of an Arrow stream, ``start`` is the byte where the
    record batch with the first record begins, whose first ``skip`` rows are another part's. ``file`` is the file's name
    in the folder, empty where the data are a file.
    """

    first: int
    count: int
    start: int = 0
    stop: int = 0
    skip: int = 0
    file: str = ""


def parts(path: str, size: int) -> list[Part]:
    """Parts of ``size`` records, the last one of a file of fewer. All but Parquet is read once for it.

    Raises:
        SampleInvalid: the data are missing, unreadable, broken or empty, or a folder holds none.
        StoreUnavailable: object storage does not answer.
    """
    found: list[Part] = []
    for name in _files(path):
        first = found[-1].first + found[-1].count if found else 0
        found += _file_parts(path, name, first, size)
    if not found:
        raise SampleInvalid(f"{public(path)}: the data set is empty; it must hold at least one record")
    return found


def read_part(path: str, part: Part) -> list[Any]:
    """The part's records as JSON values, or as the SampleInvalid that a line or row which cannot be read is.

    Raises:
        SampleInvalid: the file is not what ``parts`` found any more.
        StoreUnavailable: object storage does not answer.
    """
    place, where = _place(path, part.file), source_of(path, part)

    def read(file: BufferedIOBase) -> list[Any]:
        if _kind(place) == "Parquet":
            return _named(parquet_rows(file, part.start, part.stop), part.first, where)
        if _kind(place) == "Arrow":
            return _named(arrow_rows(file, part.start, part.skip, part.count), part.first, where)
        file.seek(part.start)
        text = file.read(part.stop - part.start)
        if len(text) != part.stop - part.start:
            raise EOFError(f"{len(text)} bytes came of {part.stop - part.start}")
        return (line_values if _kind(place) == "JSON Lines" else list_values)(text, part.first, where)

    found = _opened(place, read)
    if len(found) != part.count:
        raise SampleInvalid(
            f"{where}: expected {part.count} records from number {part.first} on, got {len(found)}: the data have "
            "changed since they were looked through; run the command again"
        )
    return found


def data_digest(path: str) -> str:
    """SHA-256 of a data file, or of the names and digests of a folder's, 32 hexadecimal digits.

    Raises:
        SampleInvalid: the data are missing or unreadable.
        StoreUnavailable: object storage does not answer.
    """
    found = {
        name: _opened(_place(path, name), lambda file: hashlib.file_digest(file, "sha256")).hexdigest()[:32]
        for name in _files(path)
    }
    return found[""] if "" in found else digest(list(found.items()))


def source_of(path: str, part: Part) -> str:
    """Where a part's records come from, for messages."""
    return f"{public(path)}: {part.file}" if part.file else public(path)


def public(path: str) -> str:
    """The path for messages: of a URL without credentials and query, which may hold secrets."""
    scheme, separator, rest = path.partition("://")
    if not separator:
        return path
    host, slash, name = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{name.partition('?')[0]}"


def _files(path: str) -> list[str]:
    """The names of a folder's data files, in order; one empty name where the data are a file."""
    store, name = _stored(path)
    if store.is_file(name):
        return [""]
    names, where = Store(path).names(""), public(path)
    if not names:
        raise SampleInvalid(f"{where}: no such data file, nor a folder that holds any")
    if "dataset_dict.json" in names:
        splits = ", ".join(n for n in names if n != "dataset_dict.json")
        raise SampleInvalid(f"{where}: holds several data sets ({splits}); give the path of one, such as {where}/…")
    if "state.json" in names:
        return _saved(_place(path, "state.json"))
    shards = [n for n in names if n.endswith(SHARDS)]
    if len({_kind(n) for n in shards}) != 1:
        raise SampleInvalid(
            f"{where}: expected a folder of .parquet files or one of .jsonl files, found "
            f"{shown(', '.join(shards or names))}"
        )
    return shards


def _saved(place: str) -> list[str]:
    """The files of a data set that ``save_to_disk`` wrote, from its ``state.json``."""
    try:
        state = json.loads(_opened(place, lambda file: file.read()))
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        if isinstance(error, SampleInvalid):
            raise
        raise SampleInvalid(f"{public(place)}: expected the `_data_files` of a data set on disk") from None
    if any("/" in name or not name.endswith(".arrow") for name in names):
        raise SampleInvalid(
            f"{public(place)}: _data_files: expected names of .arrow files beside it, got {shown(names)}"
        )
    return names


def _file_parts(path: str, name: str, first: int, size: int) -> list[Part]:
    """The parts of one file, whose first record has the number ``first``."""
    place = _place(path, name)

    def find(file: BufferedIOBase) -> list[Part]:
        if _kind(place) == "Parquet":
            rows = parquet_count(file)
            counts = {at: min(size, rows - at) for at in range(0, rows, size)}
            return [Part(first + at, count, at, at + count, file=name) for at, count in counts.items()]
        if _kind(place) == "Arrow":
            return _cut(arrow_batches(file), name, first, size)
        ranges = lines(file) if _kind(place) == "JSON Lines" else elements(file, public(place))
        return _grouped(ranges, name, first, size)

    return _opened(place, find)


def _grouped(ranges: Iterator[tuple[int, int]], name: str, first: int, size: int) -> list[Part]:
    """Parts of so many byte ranges."""
    found = []
    while group := list(islice(ranges, size)):
        found.append(Part(first, len(group), group[0][0], group[-1][1], file=name))
        first += len(group)
    return found


def _cut(batches: Iterator[tuple[int, int]], name: str, first: int, size: int) -> list[Part]:
    """Parts of so many rows of record batches, whose borders are elsewhere."""
    starts, before = [], 0
    for start, rows in batches:
        starts += [(at, start, at - before) for at in range(-(-before // size) * size, before + rows, size)]
        before += rows
    return [Part(first + at, min(size, before - at), start, skip=skip, file=name) for at, start, skip in starts]


def _named(rows: Iterator[Any], first: int, where: str) -> list[Any]:
    """The rows, errors among them with their place; the first is record ``first``."""
    return [
        SampleInvalid(f"{where}: record {number}: {row}") if isinstance(row, SampleInvalid) else row
        for number, row in enumerate(rows, first)
    ]


def _place(path: str, name: str) -> str:
    return f"{path.rstrip('/')}/{name}" if name else path


def _kind(place: str) -> str:
    """What a file is read as, by its name."""
    return KINDS.get(PurePosixPath(public(place)).suffix, "JSON")


def _stored(path: str) -> tuple[Store, str]:
    """The store of the file's folder, and its name there."""
    if "@" in path.partition("://")[2].partition("/")[0]:
        raise SampleInvalid(f"{public(path)}: a URL with credentials in it; they come from the environment alone")
    folder, slash, name = path.rstrip("/").rpartition("/")
    return Store(folder or slash or "."), name


def _opened(path: str, work: Callable[[BufferedIOBase], T]) -> T:
    """What ``work`` makes of the open file; tried again where object storage fails.

    Raises:
        SampleInvalid: the file is missing or unreadable.
        StoreUnavailable: object storage does not answer.
    """
    store, name = _stored(path)

    def attempt() -> T:
        with store.fs.open(store.path(name), "rb") as file:
            return work(file)

    try:
        return store.patiently(name, attempt)
    except SampleInvalid:
        raise
    except StoreUnavailable as error:
        raise StoreUnavailable(str(error).replace(path, public(path))) from None
    except FileNotFoundError:
        raise SampleInvalid(f"{public(path)}: no such data file") from None
    except (OSError, ValueError, pa.ArrowException) as error:
        raise SampleInvalid(f"{public(path)}: cannot be read as {_kind(path)}: {error}") from None
