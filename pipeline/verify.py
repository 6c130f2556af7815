"""Verifies a finished artifact: every byte against its digests, every shard's values against its table and inputs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.shards import Row, file_digest, read_manifest, read_shard, rows_of
from pipeline.stage import file_digests, read_record, record_bytes
from pipeline.store import Store
from schemas.artifacts import RECORD, ArtifactRef
from schemas.canonical import digest
from schemas.config import CacheConfig
from schemas.errors import ShardCorrupt, StoreUnavailable
from schemas.manifest import MANIFEST, is_shard
from schemas.tables import SAMPLES, STATISTICS, VISION, Table

# What a shard's rows say that they should not: the shard's index and rows to reasons.
Check = Callable[[int, list[Row]], Iterator[str]]


@dataclass(frozen=True)
class Problem:
    """One object of an artifact that is not what it should be."""

    name: str
    what: str


def verify(store: Store, ref: ArtifactRef, table: Table | None = None, check: Check | None = None) -> list[Problem]:
    """What is wrong with a finished artifact; nothing if its record has not been written.

    ``table`` is its shards' table, ``check`` looks at their rows.
    """
    try:
        record = read_record(store, ref)
        if record is None:
            return []
        problems = []
        if record.ref != str(ref) or record.fingerprint != digest(record.identity):
            problems.append(Problem(RECORD, "is another artifact's"))
        if store.read(ref.record_path) != record_bytes(record):
            problems.append(Problem(RECORD, "is not as it was written"))
        found = file_digests(store, ref)
        problems += [
            Problem(name, "is missing" if name not in found else "is not as it was written")
            for name, wanted in record.files.items()
            if found.get(name) != wanted
        ]
        problems += [Problem(name, "is no part of the artifact") for name in found.keys() - record.files.keys()]
        if table is None or any(p.name == MANIFEST for p in problems):
            return problems
        return problems + list(_shards(store, ref, table, check))
    except (ShardCorrupt, StoreUnavailable) as error:
        return [Problem(RECORD, str(error))]


def _shards(store: Store, ref: ArtifactRef, table: Table, check: Check | None) -> Iterator[Problem]:
    manifest = read_manifest(store, ref)
    present = {name for name in store.names(str(ref)) if is_shard(name)}
    yield from (
        Problem(name, "is no part of the artifact") for name in sorted(present - {s.name for s in manifest.shards})
    )
    for info in manifest.shards:
        if info.name not in present:
            yield Problem(info.name, "is missing")
            continue
        try:
            if file_digest(store, f"{ref}/{info.name}") != info.digest:
                yield Problem(info.name, "is not as it was written")
                continue
            reasons = check(info.index, rows_of(read_shard(store, ref, table, info))) if check else iter(())
            yield from (Problem(info.name, reason) for reason in reasons)
        except (ShardCorrupt, StoreUnavailable) as error:
            yield Problem(info.name, str(error))


def targets_check(store: Store, samples: ArtifactRef, cache: CacheConfig, vocabulary: int) -> Check:
    """Checks rows of ``targets`` against the samples that they belong to, and their values' ranges."""
    manifest = read_manifest(store, samples)

    def check(index: int, rows: list[Row]) -> Iterator[str]:
        names = ["sample_id", "tokens"]
        own = read_shard(store, samples, SAMPLES, manifest.shards[index], names)
        if own["sample_id"].to_pylist() != [row["sample_id"] for row in rows]:
            yield "its sample_ids are not those of the samples' shard"
            return
        for row, tokens in zip(rows, own["tokens"].to_pylist(), strict=True):
            yield from (f"{row['sample_id']}: {reason}" for reason in _row(row, tokens, cache, vocabulary))

    return check


def _row(row: Row, tokens: int, cache: CacheConfig, vocabulary: int) -> Iterator[str]:
    positions = row["positions"]
    for name, dtype in STATISTICS.items():
        values = np.frombuffer(row[name], dtype)
        if len(values) != positions:
            yield f"{name} has {len(values)} values for {positions} positions"
        elif not np.isfinite(values).all() or (name == "gold_logprob" and (values > 0).any()):
            yield f"{name} has values out of range"
    if cache.targets.kind != "final_hidden" and (_values(row, "ids", row["ids_dtype"]) >= vocabulary).any():
        yield "ids are beyond the vocabulary"
    if cache.targets.kind == "sampled":
        unique, counts = _values(row, "n_unique", "u1"), _values(row, "counts", "u1").astype(np.int64)
        groups = np.repeat(np.arange(len(unique)), unique)
        if len(unique) != positions or len(counts) != len(groups):
            yield "counts and n_unique do not fit"
        elif (np.bincount(groups, counts, positions) != cache.targets.draws).any():
            yield f"counts do not sum to {cache.targets.draws} at every position"
    width = 2 if cache.taps.dtype == "bfloat16" else 1
    for name in (n for n in row if n.startswith("tap_") and not n.endswith("_scale") and row[n] is not None):
        if row[name].size % (tokens * width):
            yield f"{name} has {row[name].size} bytes for {tokens} tokens"
    if cache.vision != "none":
        yield from _vision(row)


def _vision(row: Row) -> Iterator[str]:
    value, patches = row[VISION], row["patches"]
    if value is None or patches <= 0:
        if value is not None or patches:
            yield f"{VISION} and its number of patches ({patches}) do not fit"
    elif value.size == 0 or value.size % (2 * patches):
        yield f"{VISION} has {value.size} bytes for {patches} patches"
    # no number or infinite in bfloat16: all bits of the exponent
    elif (_values(row, VISION, "<u2") & 0x7F80 == 0x7F80).any():
        yield f"{VISION} has values that are no finite numbers"


def _values(row: Row, name: str, dtype: str) -> Any:
    return np.frombuffer(row[name], dtype)


def drop(store: Store, ref: ArtifactRef, problems: list[Problem]) -> None:
    """Removes what is wrong, and record and manifest, so that the stage makes just that again."""
    for name in {p.name for p in problems} | {MANIFEST, RECORD}:
        store.remove(f"{ref}/{name}")
