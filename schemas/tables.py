"""The tables on disk: named, versioned columns in plain Arrow types, defined once.

Payloads of variable shape are flat little-endian bytes in ``large_binary`` (one value a row and column is 20 to 50
times faster to write and read than nested lists); what is needed to decode them stands in columns beside them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from schemas.artifacts import ArtifactRecord
from schemas.config import CacheConfig, TapsConfig, TargetsConfig
from schemas.errors import ShardCorrupt

# Compression takes a fifth off activations and most of the speed of reading them.
ACTIVATIONS: Literal["none"] = "none"
# The column of vision features, where there are any.
VISION = "vision"


@dataclass(frozen=True)
class Column:
    """One column: name, Arrow type, meaning, whether rows may lack it, and its compression on disk."""

    name: str
    type: pa.DataType
    doc: str
    nullable: bool = False
    compression: Literal["zstd", "none"] = "zstd"


@dataclass(frozen=True)
class Table:
    """A named, versioned list of columns."""

    name: str
    version: int
    columns: tuple[Column, ...]

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

    def schema(self) -> pa.Schema:
        """The Arrow schema; without the docs, which would be a fifth of a small shard."""
        return pa.schema([pa.field(c.name, c.type, c.nullable) for c in self.columns])

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
    2,
    (
        Column("sample_id", pa.string(), "digest of the canonical sample: turns, images' contents, token ids"),
        Column("record", pa.string(), "the record's `id` in the user's file"),
        Column("input_ids", pa.large_binary(), "int32[tokens]: token ids, the image token repeated per image position"),
        Column("spans", pa.large_binary(), "int32[spans, 2]: supervised token ranges [start, stop)"),
        Column("tokens", pa.int32(), "number of tokens"),
        Column("response_tokens", pa.int32(), "number of supervised tokens"),
        Column("images", pa.large_binary(), "the images' files, one after the other; of one image its file"),
        Column("image_bytes", pa.large_binary(), "int64[images]: the size of each file"),
    ),
)


# What a target's row says of each position beside the distribution, and the type on disk.
STATISTICS = {"lse": "<f4", "gold_logprob": "<f2", "entropy": "<f2"}

REJECTS_FILE = "rejects.parquet"
REJECTS = Table(
    "rejects",
    1,
    (
        Column("file", pa.string(), "the user's data file"),
        Column("record", pa.int64(), "the record's number in it, from 0"),
        Column("reason", pa.string(), "why it cannot be used"),
    ),
)


def tap_columns(layer: int, taps: TapsConfig) -> tuple[Column, ...]:
    """The columns of one tapped layer."""
    columns = []
    parts = {"input": "the mixer's input", "output": "the attention output"}
    for part in ["input"] if taps.targets == "recompute" else parts:
        name, doc = f"tap_{layer}_{part}", f"{taps.dtype}[tokens, hidden]: {parts[part]}"
        columns.append(Column(name, pa.large_binary(), doc, True, ACTIVATIONS))
        if taps.dtype == "fp8_e4m3":
            columns.append(Column(f"{name}_scale", pa.large_binary(), "float32[tokens]: what to multiply by", True))
    return tuple(columns)


def _distribution_columns(targets: TargetsConfig) -> tuple[Column, ...]:
    """What each kind of target keeps of the distribution."""
    ids_dtype = Column("ids_dtype", pa.string(), "`uint16` or `uint32`")
    if targets.kind == "sampled":
        return (
            Column(
                "ids", pa.large_binary(), "uint16 or uint32 [sum of n_unique]: drawn token ids, ascending a position"
            ),
            ids_dtype,
            Column("counts", pa.large_binary(), "uint8[sum of n_unique]: draws of each id; they sum to N a position"),
            Column("n_unique", pa.large_binary(), "uint8[positions]: distinct ids a position"),
        )
    if targets.kind == "top_k":
        return (
            Column("ids", pa.large_binary(), "uint16 or uint32 [positions, k]: token ids, most probable first"),
            ids_dtype,
            Column("logprobs", pa.large_binary(), "float16[positions, k]: log-probabilities over the whole vocabulary"),
        )
    meaning = f"{targets.dtype}[positions, hidden]: the state before the head"
    hidden = Column("hidden", pa.large_binary(), meaning, compression=ACTIVATIONS)
    scale = Column("hidden_scale", pa.large_binary(), "float32[positions]: what to multiply by")
    return (hidden, scale) if targets.dtype == "fp8_e4m3" else (hidden,)


def _vision_columns(cache: CacheConfig) -> tuple[Column, ...]:
    """The features that enter the connector, of each row's image."""
    if cache.vision == "none":
        return ()
    features = f"{cache.vision}[patches, width]: the features that enter the connector"
    return (
        Column("patches", pa.int32(), "patches of the image, 0 where there is none"),
        Column(VISION, pa.large_binary(), features, True, ACTIVATIONS),
    )


def targets_table(cache: CacheConfig, tapped: Sequence[int]) -> Table:
    """The ``targets`` table of a cache with taps of the given layers; rows stand as in the samples' same shard."""
    columns = (
        Column("sample_id", pa.string(), "as in `samples`"),
        Column("positions", pa.int32(), "positions with a target"),
        *_distribution_columns(cache.targets),
        Column("lse", pa.large_binary(), "float32[positions]: log-sum-exp of the logits"),
        Column("gold_logprob", pa.large_binary(), "float16[positions]: log-probability of the token that follows"),
        Column("entropy", pa.large_binary(), "float16[positions]: entropy at the capture temperature, nats"),
        *_vision_columns(cache),
    )
    taps = tuple(c for layer in tapped for c in tap_columns(layer, cache.taps))
    return Table("targets", 2, columns + taps)


def recorded_cache(record: ArtifactRecord) -> tuple[CacheConfig, tuple[int, ...]]:
    """The settings and tapped layers that a finished cache was made with."""
    return CacheConfig.model_validate(record.config["cache"]), tuple(record.identity["settings"]["taps"]["layers"])


def recorded_table(record: ArtifactRecord) -> Table | None:
    """The table of a finished artifact's shards, None where its stage leaves other files."""
    kind = record.ref.partition("/")[0]
    if kind == "cache":
        return targets_table(*recorded_cache(record))
    return SAMPLES if kind == "prepare" else None
