"""Records in tables: the rows of Parquet files and of Arrow streams, which Hugging Face datasets are on disk.

Reads a few hundred rows at a time, so that a file may be larger than memory.
"""

from collections.abc import Iterator
from io import BufferedIOBase
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import SampleInvalid

# Rows made Python values at once; with an image each, some hundred megabytes at most.
ROWS = 256


def parquet_count(file: BufferedIOBase) -> int:
    """Number of rows."""
    return int(pq.ParquetFile(file).metadata.num_rows)


def parquet_rows(file: BufferedIOBase, start: int, stop: int) -> Iterator[dict[str, Any] | SampleInvalid]:
    """The rows [start, stop), from the row groups that hold them, each as a record or as the error that it is."""
    parquet, groups, before, at = pq.ParquetFile(file), [], 0, 0
    for group in range(parquet.metadata.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        if at + rows > start and at < stop:
            groups.append(group)
        elif not groups:
            before = at + rows
        at += rows
    batches = parquet.iter_batches(ROWS, groups)
    return islice((row for batch in batches for row in _values(batch)), start - before, stop - before)


def arrow_batches(file: BufferedIOBase) -> Iterator[tuple[int, int]]:
    """Where each record batch of a stream begins, in bytes, and how many rows it has."""
    with pa.ipc.open_stream(file) as stream:
        start = file.tell()
        for batch in stream:
            yield start, batch.num_rows
            start = file.tell()


def arrow_rows(file: BufferedIOBase, start: int, skip: int, count: int) -> Iterator[dict[str, Any] | SampleInvalid]:
    """``count`` rows, the first of them ``skip`` after the batch that begins at byte ``start``.

    A stream has no index: its schema is read from the head, then the batches from ``start`` on.
    """
    with pa.ipc.open_stream(file) as stream:
        file.seek(start)
        for batch in stream:
            rows = batch.slice(skip, count)
            for at in range(0, rows.num_rows, ROWS):
                yield from _values(rows.slice(at, ROWS))
            skip, count = 0, count - rows.num_rows
            if not count:
                break


def _values(batch: pa.RecordBatch) -> list[Any]:
    """The rows as Python values; if text among them is none, the rows that hold it as errors."""
    try:
        found: list[Any] = batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [SampleInvalid(f"cannot be read: {error.reason} at byte {error.start} of a text")]
        found = [value for at in range(batch.num_rows) for value in _values(batch.slice(at, 1))]
    return found
