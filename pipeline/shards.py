"""Shards: one Parquet file a unit of work, self-describing and checked, and the manifest folded from their footers.

The same rows give the same bytes: no time, host or order of writing enters a shard.
"""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pydantic

from pipeline.store import Store
from schemas.artifacts import RECORD, ArtifactRef
from schemas.errors import ShardCorrupt
from schemas.manifest import MANIFEST, Manifest, ShardInfo, missing_shards, shard_name
from schemas.tables import Table

Columns = Mapping[str, Sequence[object] | pa.Array]


def write_shard(
    store: Store,
    ref: ArtifactRef,
    table: Table,
    index: int,
    columns: Columns,
    fingerprint: str,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Commits shard ``index`` of an artifact from every column of the table, as lists or as Arrow arrays.

    ``notes`` are what else is to be known of the shard; they stand in its footer.
    """
    store.write_by(
        f"{ref}/{shard_name(index)}", lambda file: encode_shard(file, table, index, columns, fingerprint, notes)
    )


def as_rows(table: Table, columns: Columns) -> pa.Table:
    """The columns as an Arrow table of their types."""
    schema = table.schema()
    return pa.table({name: pa.array(columns[name], schema.field(name).type) for name in schema.names}, schema=schema)


def encode_shard(
    file: BinaryIO,
    table: Table,
    index: int,
    columns: Columns,
    fingerprint: str,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Writes a shard as it is committed."""
    data = as_rows(table, columns)
    footer = {
        "decant.table": table.name,
        "decant.version": str(table.version),
        "decant.fingerprint": fingerprint,
        "decant.shard": str(index),
        "decant.rows": str(data.num_rows),
        "decant.checksum": checksum(data),
        **{f"decant.{name}": value for name, value in (notes or {}).items()},
    }
    small = [c.name for c in table.columns if c.compression == "zstd" and not pa.types.is_integer(c.type)]
    pq.write_table(
        data.replace_schema_metadata(footer),
        file,
        compression={c.name: c.compression for c in table.columns},
        use_dictionary=False,
        # lengths by themselves compress better than one before each value
        column_encoding=dict.fromkeys(small, "DELTA_LENGTH_BYTE_ARRAY"),
        # the smallest and largest payload say nothing, and would take up to 4 KB four times a column
        write_statistics=False,
        # four bytes a page, by which a reader of some columns notices damage in them
        write_page_checksum=True,
    )


def shard_bytes(table: Table, index: int, columns: Columns, fingerprint: str) -> bytes:
    """A shard that is not committed."""
    file = io.BytesIO()
    encode_shard(file, table, index, columns, fingerprint)
    return file.getvalue()


def checksum(data: pa.Table) -> str:
    """SHA-256 over the columns' names, types, empty places and values, 32 hexadecimal digits."""
    state = hashlib.sha256()
    for name in sorted(data.schema.names):
        column = data[name]
        state.update(f"{name}:{column.type}:{len(column)};".encode())
        if pa.types.is_integer(column.type):
            state.update(column.to_numpy().astype("<i8").tobytes())
            continue
        for scalar in column:
            value = scalar.as_buffer()
            state.update(b"-" if value is None else value.size.to_bytes(8, "little"))
            state.update(b"" if value is None else value)
    return state.hexdigest()[:32]


def read_shard(
    store: Store, ref: ArtifactRef, table: Table, info: ShardInfo, columns: Sequence[str] | None = None
) -> pa.Table:
    """Rows of one shard, checked against the manifest's entry; only the named columns where given.

    Rows, types, names and each page's checksum are checked always; the checksum over all values where all are read.

    Raises:
        ShardCorrupt: the file is truncated, altered or of another table.
    """
    where = store.path(f"{ref}/{info.name}")
    try:
        names = list(columns) if columns else None
        if store.local:  # Arrow reads a file four times as fast by itself as through Python
            data = _read(where, names)
        else:
            data = _parquet(store, f"{ref}/{info.name}", lambda file: _read(file, names))
    except (pa.ArrowException, OSError) as error:
        raise ShardCorrupt(f"{where}: cannot be read as Parquet: {_line(error)}; {_remedy(ref)}") from None
    table.check(data, where)
    if data.num_rows != info.rows:
        raise ShardCorrupt(f"{where}: expected {info.rows} rows, got {data.num_rows}")
    if columns is None and checksum(data) != info.checksum:
        raise ShardCorrupt(f"{where}: values do not match the checksum; {_remedy(ref)}")
    return data


def _read(file: Any, columns: list[str] | None) -> pa.Table:
    local: dict[str, Any] = {"memory_map": True, "partitioning": None} if isinstance(file, str) else {}
    return pq.read_table(file, columns=columns, page_checksum_verification=True, **local)


def _parquet(store: Store, name: str, read: Callable[[Any], Any]) -> Any:
    """What ``read`` makes of the opened file; where that is no Parquet, a whole copy of the right length decides."""

    def attempt() -> Any:
        with store.fs.open(store.path(name), "rb") as file:
            return read(file)

    try:
        return store.patiently(name, attempt)
    except pa.ArrowInvalid:
        if store.local:
            raise
        return read(pa.BufferReader(store.read(name)))


class Row(Mapping[str, Any]):
    """One row of a table: numbers and texts as Python's, binary values as buffers of the table's own memory."""

    def __init__(self, columns: Mapping[str, pa.Array], index: int) -> None:
        self._columns, self._index = columns, index

    def __getitem__(self, name: str) -> Any:
        value = self._columns[name][self._index]
        return value.as_buffer() if pa.types.is_large_binary(value.type) else value.as_py()

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


def rows_of(data: pa.Table) -> list[Row]:
    """The rows of a table, without copying a payload."""
    columns = {name: data[name].combine_chunks() for name in data.schema.names}
    return [Row(columns, index) for index in range(data.num_rows)]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _remedy(ref: ArtifactRef) -> str:
    return f"remove it and the {RECORD} beside it, then run `decant {ref.kind} RUN.yaml`: only this shard is made again"


def read_notes(store: Store, ref: ArtifactRef, name: str) -> dict[str, str]:
    """What a shard's footer says of it: the ``decant.*`` entries, without the prefix."""
    where = store.path(f"{ref}/{name}")
    try:
        metadata = _parquet(store, f"{ref}/{name}", pq.read_schema).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise ShardCorrupt(f"{where}: cannot be read as Parquet: {_line(error)}; {_remedy(ref)}") from None
    found = notes_of(metadata)
    if not found:
        raise ShardCorrupt(f"{where}: was not written by decant (no footer)")
    return found


def notes_of(metadata: Mapping[bytes, bytes]) -> dict[str, str]:
    """The ``decant.*`` entries of a footer, or of the schema of rows that were read, without the prefix."""
    return {k.decode()[7:]: v.decode() for k, v in metadata.items() if k.startswith(b"decant.")}


def uncommitted(store: Store, ref: ArtifactRef, count: int) -> list[int]:
    """Indices of the shards that are still to be made, of ``count``."""
    return missing_shards(count, store.names(str(ref)))


def fold_manifest(store: Store, ref: ArtifactRef, table: Table, count: int, fingerprint: str) -> Manifest:
    """Reads the footers of all ``count`` shards, checks that they belong together, and commits the manifest.

    Every shard is read once more for its digest: what cannot be read back is found now.
    """
    shards = []
    for index in range(count):
        name = shard_name(index)
        footer = read_notes(store, ref, name)
        expected = {"table": table.name, "version": str(table.version), "fingerprint": fingerprint, "shard": str(index)}
        for key, value in expected.items():
            if footer.get(key) != value:
                where = store.path(f"{ref}/{name}")
                raise ShardCorrupt(f"{where}: footer `{key}`: expected {value}, got {footer.get(key)}")
        shards.append(
            ShardInfo(
                index=index,
                name=name,
                rows=int(footer["rows"]),
                bytes=store.size(f"{ref}/{name}"),
                checksum=footer["checksum"],
                digest=file_digest(store, f"{ref}/{name}"),
            )
        )
    manifest = Manifest(table=table.name, version=table.version, fingerprint=fingerprint, shards=tuple(shards))
    store.write(f"{ref}/{MANIFEST}", (manifest.model_dump_json(indent=1) + "\n").encode())
    return manifest


def file_digest(store: Store, name: str) -> str:
    """SHA-256 of an object, 32 hexadecimal digits."""
    return hashlib.sha256(store.read(name)).hexdigest()[:32]


def read_manifest(store: Store, ref: ArtifactRef) -> Manifest:
    """The manifest of a finished artifact.

    Raises:
        ShardCorrupt: it is damaged.
    """
    try:
        return Manifest.model_validate_json(store.read(f"{ref}/{MANIFEST}"))
    except pydantic.ValidationError as error:
        where = store.path(f"{ref}/{MANIFEST}")
        raise ShardCorrupt(
            f"{where}: is not a manifest: {_line(error)}; remove it and the {RECORD} beside it, "
            f"then run `decant {ref.kind} RUN.yaml`"
        ) from None


def column_bytes(store: Store, ref: ArtifactRef, manifest: Manifest) -> dict[str, int]:
    """Bytes on disk of each column over all shards, as Parquet stores them."""
    total: dict[str, int] = {}
    for shard in manifest.shards:
        metadata = _parquet(store, f"{ref}/{shard.name}", pq.read_metadata)
        for group in range(metadata.num_row_groups):
            for i in range(metadata.num_columns):
                column = metadata.row_group(group).column(i)
                total[column.path_in_schema] = total.get(column.path_in_schema, 0) + column.total_compressed_size
    return total
