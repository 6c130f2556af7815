"""Raw records of a data file, part by part, so that a file larger than memory is read by several workers.

A file is a JSON list (``.json``), JSON Lines (``.jsonl``) or Parquet (``.parquet``), on local disk or at a URL.
"""

import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.store import Store
from schemas.errors import SampleInvalid

T = TypeVar("T")
# Bytes of text read at once; a record that is not whole within the limit is no record.
CHUNK, LONGEST_RECORD = 1 << 20, 1 << 28
# Rows read at once from a Parquet file; with an image each, some hundred megabytes at most.
PARQUET_ROWS = 256
BLANKS = re.compile(r"[ \t\r\n]*")
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Part:
    """``count`` records from number ``first`` on: the bytes [start, stop) of a text, the rows of a Parquet file."""

    first: int
    count: int
    start: int = 0
    stop: int = 0


def parts(path: str, size: int) -> list[Part]:
    """Parts of ``size`` records, the last one of fewer. Texts are read once for it, one chunk at a time.

    Raises:
        SampleInvalid: the file is missing, unreadable, broken or empty.
        StoreUnavailable: object storage does not answer.
    """

    def find(file: io.BufferedIOBase) -> list[Part]:
        if path.endswith(".parquet"):
            rows = pq.ParquetFile(file).metadata.num_rows
            return [Part(at, min(size, rows - at)) for at in range(0, rows, size)]
        return _grouped(_lines(file) if path.endswith(".jsonl") else _elements(file, path), size)

    found = opened(path, find)
    if not found:
        raise SampleInvalid(f"{path}: the data set is empty; it must hold at least one record")
    return found


def read_part(path: str, part: Part) -> list[Any]:
    """The part's records as JSON values, or as the SampleInvalid that a line or cell which cannot be read is."""

    def read(file: io.BufferedIOBase) -> list[Any]:
        if path.endswith(".parquet"):
            return [_flat(row, f"{path}: record {n}") for n, row in enumerate(_rows(file, part), part.first)]
        file.seek(part.start)
        text = file.read(part.stop - part.start)
        if len(text) != part.stop - part.start:
            raise EOFError(f"{len(text)} bytes came of {part.stop - part.start}")
        if path.endswith(".jsonl"):
            lines = (line for line in io.BytesIO(text) if line.strip())
            return [_value(line, f"{path}: record {n}") for n, line in enumerate(lines, part.first)]
        found: list[Any] = json.loads(b"[%s]" % text)
        return found

    return opened(path, read)


def opened(path: str, work: Callable[[io.BufferedIOBase], T]) -> T:
    """What ``work`` makes of the open file; tried again where object storage fails.

    Raises:
        SampleInvalid: the file is missing or unreadable.
        StoreUnavailable: object storage does not answer.
    """
    folder, slash, name = path.rpartition("/")
    store = Store(folder or slash or ".")

    def attempt() -> T:
        with store.fs.open(store.path(name), "rb") as file:
            return work(file)

    kind = "Parquet" if path.endswith(".parquet") else "JSON"
    try:
        return store.patiently(name, attempt)
    except FileNotFoundError:
        raise SampleInvalid(f"{path}: no such data file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, pa.ArrowException) as error:
        raise SampleInvalid(f"{path}: cannot be read as {kind}: {error}") from None


def _grouped(ranges: Iterator[tuple[int, int]], size: int) -> list[Part]:
    found, first = [], 0
    while group := list(islice(ranges, size)):
        found.append(Part(first, len(group), group[0][0], group[-1][1]))
        first += len(group)
    return found


def _lines(file: io.BufferedIOBase) -> Iterator[tuple[int, int]]:
    """The byte range of each line that is not blank."""
    at = 0
    for line in file:
        if line.strip():
            yield at, at + len(line)
        at += len(line)


def _elements(file: io.BufferedIOBase, path: str) -> Iterator[tuple[int, int]]:
    """The byte range of each element of a JSON list.

    Bytes are looked at as Latin-1, where a character is a byte: what is beyond ASCII stands inside strings only.
    """
    decoder = json.JSONDecoder()
    head = file.read(CHUNK)
    offset = len(BOM) if head.startswith(BOM) else 0
    text, at = head[offset:].decode("latin-1"), 0

    def more(least: int) -> bool:
        """Forgets what has been passed and reads on; False at the end."""
        nonlocal text, at, offset
        new = file.read(max(CHUNK, least))
        if new:
            text, offset, at = text[at:] + new.decode("latin-1"), offset + at, 0
        return bool(new)

    def peek() -> str:
        """The next character that is no blank, empty at the end."""
        nonlocal at
        while (at := BLANKS.match(text, at).end()) == len(text):  # type: ignore[union-attr]
            if not more(0):
                return ""
        return text[at]

    def end() -> int:
        """Where the element that begins here ends."""
        while True:
            stop, problem = None, SampleInvalid()
            try:
                stop = decoder.raw_decode(text, at)[1]
            except json.JSONDecodeError as error:
                problem = _broken(path, offset + error.pos, error.msg)
            # twice as much each time, so that a long record is not scanned again for every chunk
            cut = stop in (None, len(text)) and len(text) - at <= LONGEST_RECORD
            if not cut or not more(len(text) - at):
                if stop is None:
                    raise problem
                return stop

    if peek() != "[":
        raise SampleInvalid(f"{path}: expected a JSON list of records")
    at += 1
    if peek() != "]":
        while True:
            peek()
            stop = end()
            yield offset + at, offset + stop
            at = stop
            if (character := peek()) == "]":
                break
            if character != ",":
                raise _broken(path, offset + at, "expected a comma or the list's end")
            at += 1
    at += 1
    if peek():
        raise _broken(path, offset + at, "there is more after the list's end")


def _broken(path: str, byte: int, what: str) -> SampleInvalid:
    return SampleInvalid(f"{path}: cannot be read as JSON: byte {byte}: {what}")


def _rows(file: io.BufferedIOBase, part: Part) -> Iterator[dict[str, Any]]:
    """The part's rows, from the row groups that hold them."""
    parquet, groups, before, at = pq.ParquetFile(file), [], 0, 0
    for group in range(parquet.metadata.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        if at + rows > part.first and at < part.first + part.count:
            groups.append(group)
        elif not groups:
            before = at + rows
        at += rows
    rows = (row for batch in parquet.iter_batches(PARQUET_ROWS, groups) for row in batch.to_pylist())
    return islice(rows, part.first - before, part.first - before + part.count)


def _flat(row: dict[str, Any], where: str) -> Any:
    """A Parquet row as a record: conversations may be JSON text, images structures of bytes and path."""
    image, turns = row.get("image"), row.get("conversations")
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(turns, str):
        turns = _value(turns, f"{where}: conversations")
    return {**row, "image": image, "conversations": turns}


def _value(text: bytes | str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return SampleInvalid(f"{where}: cannot be read as JSON: {error}")
