"""The ``prepare`` stage's work: parts of a data file to committed shards of the ``samples`` table.

Part and shard have the same number and rows, less what is rejected. What was rejected, and how many samples were cut,
stands in the shard's footer, so that a shard and the account of it are one commit.
"""

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.conversations import part_conversations
from pipeline.data.encoding import EncodedSample, Encoder, read_image
from pipeline.data.records import Part
from pipeline.shards import fold_manifest, notes_of, read_shard, write_shard
from pipeline.store import Store
from schemas.artifacts import ArtifactRef
from schemas.config import PrepareConfig
from schemas.errors import SampleInvalid
from schemas.tables import REJECTS, REJECTS_FILE, SAMPLES

# A record that cannot be used: its number in the file, from 0, and why.
Reject = tuple[int, str]


def prepare_shard(
    store: Store, ref: ArtifactRef, config: PrepareConfig, encoder: Encoder, part: Part, index: int, fingerprint: str
) -> int:
    """Encodes a part of the data file and commits it as shard ``index``; returns its number of records.

    Raises:
        SampleInvalid: the file cannot be read; or a record cannot be used, and those are not to be skipped.
    """
    images = Store(config.images)
    rows: list[EncodedSample] = []
    rejects: list[Reject] = []
    for number, item in enumerate(part_conversations(config.data, part), part.first):
        try:
            if isinstance(item, SampleInvalid):
                raise item
            rows.append(encoder.encode(item, read_image(item, images)))
        except SampleInvalid as error:
            if config.on_bad_sample == "fail":
                raise
            # without the folders, which are the run's and not the record's
            reason = str(error).removeprefix(f"{config.data}: ").replace(f"{images.root}/", "")
            rejects.append((number, reason))
    notes = {"rejects": json.dumps(rejects), "truncated": str(sum(r.truncated for r in rows))}
    write_shard(store, ref, SAMPLES, index, sample_columns(rows), fingerprint, notes)
    return part.count


def finish(store: Store, ref: ArtifactRef, config: PrepareConfig, count: int, fingerprint: str) -> dict[str, Any]:
    """Writes the rejects and the manifest of ``count`` committed shards; returns counts for the record.

    Raises:
        SampleInvalid: no record could be used.
    """
    manifest = fold_manifest(store, ref, SAMPLES, count, fingerprint)
    counts = {"samples": manifest.rows, "tokens": 0, "response_tokens": 0, "truncated": 0}
    seen: set[str] = set()
    rejects: list[Reject] = []
    for info in manifest.shards:
        data = read_shard(store, ref, SAMPLES, info, ["sample_id", "tokens", "response_tokens"])
        notes = notes_of(data.schema.metadata)
        counts["tokens"] += sum(data["tokens"].to_pylist())
        counts["response_tokens"] += sum(data["response_tokens"].to_pylist())
        counts["truncated"] += int(notes["truncated"])
        seen.update(data["sample_id"].to_pylist())
        rejects += [(number, reason) for number, reason in json.loads(notes["rejects"])]
    if not manifest.rows:
        raise SampleInvalid(f"{config.data}: none of {len(rejects)} records can be used; the first: {rejects[0][1]}")
    store.write(f"{ref}/{REJECTS_FILE}", _rejects_file(config.data, rejects))
    return {
        **counts,
        "duplicates": manifest.rows - len(seen),
        "rejected": len(rejects),
        "shards": count,
        "bytes": sum(s.bytes for s in manifest.shards),
    }


def _rejects_file(source: str, rejects: list[Reject]) -> bytes:
    columns = [[source] * len(rejects), [number for number, _ in rejects], [reason for _, reason in rejects]]
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=REJECTS.schema()), sink, compression="zstd")
    return sink.getvalue()


def sample_columns(rows: Sequence[EncodedSample]) -> dict[str, list[object]]:
    """The columns of some samples' rows."""
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
