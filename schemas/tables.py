"""The tables on disk: named, versioned columns in plain Arrow types, defined once.

Payloads of variable shape are flat little-endian bytes in ``large_binary`` (one value a row and column is 20 to 50
times faster to write and read than nested lists); what is needed to decode them stands in columns beside them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from schemas.errors import ShardCorrupt


@dataclass(frozen=True)
class Column:
    """One column: name, Arrow type, meaning, and whether rows may lack it."""

    name: str
    type: pa.DataType
    doc: str
    nullable: bool = False


@dataclass(frozen=True)
class Table:
    """A named, versioned list of columns."""

    name: str
    version: int
    columns: tuple[Column, ...]

    def schema(self, metadata: dict[str, str] | None = None) -> pa.Schema:
        """The Arrow schema, with the given footer entries."""
        fields = [pa.field(c.name, c.type, c.nullable, metadata={"doc": c.doc}) for c in self.columns]
        return pa.schema(fields, metadata=metadata)

    def check(self, table: pa.Table, where: str) -> None:
        """Raises ShardCorrupt where the table's columns are not a subset of these, of the right type, without holes."""
        known = {c.name: c for c in self.columns}
        for field in table.schema:
            column = known.get(field.name)
            if column is None or column.type != field.type:
                wanted = column.type if column else "no such column"
                raise ShardCorrupt(f"{where}: column {field.name}: expected {wanted}, got {field.type}")
            if not column.nullable and table[field.name].null_count:
                raise ShardCorrupt(f"{where}: column {field.name} has {table[field.name].null_count} empty values")


SAMPLES = Table(
    "samples",
    1,
    (
        Column("sample_id", pa.string(), "digest of the canonical sample: turns, image content, token ids"),
        Column("record", pa.string(), "the record's `id` in the user's file"),
        Column("input_ids", pa.large_binary(), "int32[tokens]: token ids, the image token repeated per image position"),
        Column("spans", pa.large_binary(), "int32[spans, 2]: supervised token ranges [start, stop)"),
        Column("tokens", pa.int32(), "number of tokens"),
        Column("response_tokens", pa.int32(), "number of supervised tokens"),
        Column("image", pa.large_binary(), "the image file's bytes as found", nullable=True),
    ),
)


def tap_columns(layer: int) -> tuple[Column, Column]:
    """The two columns of one tapped layer."""
    return (
        Column(f"tap_{layer}_input", pa.large_binary(), "bfloat16[tokens, hidden]: the mixer's input", nullable=True),
        Column(
            f"tap_{layer}_output", pa.large_binary(), "bfloat16[tokens, hidden]: the attention output", nullable=True
        ),
    )


def targets_table(tapped: Sequence[int]) -> Table:
    """The ``targets`` table of a cache with taps of the given layers; rows stand as in the samples' same shard."""
    columns = (
        Column("sample_id", pa.string(), "as in `samples`"),
        Column("positions", pa.int32(), "predicting positions: one a supervised token"),
        Column("ids", pa.large_binary(), "uint16 or uint32 [sum of n_unique]: drawn token ids, ascending a position"),
        Column("ids_dtype", pa.string(), "`uint16` or `uint32`"),
        Column("counts", pa.large_binary(), "uint8[sum of n_unique]: draws of each id; they sum to N a position"),
        Column("n_unique", pa.large_binary(), "uint8[positions]: distinct ids a position"),
        Column("lse", pa.large_binary(), "float32[positions]: log-sum-exp of the logits"),
        Column("gold_logprob", pa.large_binary(), "float16[positions]: log-probability of the token that follows"),
        Column("entropy", pa.large_binary(), "float16[positions]: entropy at the capture temperature, nats"),
    )
    return Table("targets", 1, columns + tuple(c for layer in tapped for c in tap_columns(layer)))
