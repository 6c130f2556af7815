"""The ``prepare`` stage's work: conversations to committed shards of the ``samples`` table."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.conversations import each_conversation
from pipeline.data.encoding import EncodedSample, Encoder, read_image
from pipeline.shards import fold_manifest, write_shard
from pipeline.store import Store
from schemas.artifacts import ArtifactRef
from schemas.config import PrepareConfig
from schemas.errors import SampleInvalid
from schemas.manifest import shard_name
from schemas.tables import REJECTS, REJECTS_FILE, SAMPLES


@dataclass(frozen=True)
class Reject:
    """A record that cannot be used: its number in the file, from 0, and why."""

    record: int
    reason: str


def encode_all(config: PrepareConfig, encoder: Encoder) -> Iterator[EncodedSample | Reject]:
    """Every record of the data file, encoded or rejected, in order.

    Raises:
        SampleInvalid: the file cannot be read; or a record cannot be used, and those are not to be skipped.
    """
    for index, item in enumerate(each_conversation(config.data)):
        try:
            if isinstance(item, SampleInvalid):
                raise item
            yield encoder.encode(item, read_image(item, config.images))
        except SampleInvalid as error:
            if config.on_bad_sample == "fail":
                raise
            yield Reject(index, str(error))


def prepare(
    store: Store,
    ref: ArtifactRef,
    config: PrepareConfig,
    encoder: Encoder,
    fingerprint: str,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Writes all shards, the rejects and the manifest; returns counts for the record.

    Where bad records are not skipped, one stops the stage before its shard is written. Shards already committed are
    kept and made again only where they are missing. ``progress`` gets the number of samples done.
    """
    rejects: list[Reject] = []
    samples = _accepted(encode_all(config, encoder), rejects)
    counts = {"samples": 0, "tokens": 0, "response_tokens": 0, "truncated": 0, "duplicates": 0}
    seen: set[str] = set()
    present = set(store.names(str(ref)))
    index = 0
    while rows := list(islice(samples, config.shard_rows)):
        if shard_name(index) not in present:
            write_shard(store, ref, SAMPLES, index, sample_columns(rows), fingerprint)
        counts["samples"] += len(rows)
        counts["tokens"] += sum(len(r.input_ids) for r in rows)
        counts["response_tokens"] += sum(r.response_tokens for r in rows)
        counts["truncated"] += sum(r.truncated for r in rows)
        seen.update(r.sample_id for r in rows)
        index += 1
        progress(counts["samples"])
    if not index:
        raise SampleInvalid(
            f"{config.data}: none of {len(rejects)} records can be used; the first: {rejects[0].reason}"
        )
    counts |= {"duplicates": counts["samples"] - len(seen), "rejected": len(rejects)}
    store.write(f"{ref}/{REJECTS_FILE}", _rejects_file(config.data, rejects))
    manifest = fold_manifest(store, ref, SAMPLES, index, fingerprint)
    return {**counts, "shards": index, "bytes": sum(s.bytes for s in manifest.shards)}


def _accepted(items: Iterator[EncodedSample | Reject], rejects: list[Reject]) -> Iterator[EncodedSample]:
    """The samples among the items; the others are added to ``rejects`` as they come by."""
    for item in items:
        if isinstance(item, Reject):
            rejects.append(item)
        else:
            yield item


def _rejects_file(source: str, rejects: list[Reject]) -> bytes:
    columns = [[source] * len(rejects), [r.record for r in rejects], [r.reason for r in rejects]]
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=REJECTS.schema()), sink, compression="zstd")
    return sink.getvalue()


def sample_columns(rows: Sequence[EncodedSample]) -> dict[str, list[object]]:
    """The columns of a ``samples`` shard."""
    return {
        "sample_id": [r.sample_id for r in rows],
        "record": [r.record for r in rows],
        "input_ids": [r.input_ids.astype("<i4").tobytes() for r in rows],
        "spans": [r.spans.astype("<i4").tobytes() for r in rows],
        "tokens": [len(r.input_ids) for r in rows],
        "response_tokens": [r.response_tokens for r in rows],
        "image": [r.image for r in rows],
    }


def decode_samples(data: pa.Table) -> list[EncodedSample]:
    """The rows of a ``samples`` shard, read with or without their images."""
    return [
        EncodedSample(
            row["sample_id"],
            row["record"],
            np.frombuffer(row["input_ids"], "<i4"),
            np.frombuffer(row["spans"], "<i4").reshape(-1, 2),
            row.get("image"),
            truncated=False,
        )
        for row in data.to_pylist()
    ]
