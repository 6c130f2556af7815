"""The ``prepare`` stage's work: conversations to committed shards of the ``samples`` table."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.conversations import read_conversations
from pipeline.data.encoding import EncodedSample, Encoder, read_image
from pipeline.shards import fold_manifest, write_shard
from pipeline.store import Store
from schemas.artifacts import ArtifactRef
from schemas.config import PrepareConfig
from schemas.manifest import shard_name
from schemas.tables import SAMPLES


def encode_all(config: PrepareConfig, encoder: Encoder) -> Iterator[EncodedSample]:
    """Every record of the data file, encoded, in order."""
    for conversation in read_conversations(config.data):
        yield encoder.encode(conversation, read_image(conversation, config.images))


def prepare(
    store: Store,
    ref: ArtifactRef,
    config: PrepareConfig,
    encoder: Encoder,
    fingerprint: str,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Writes all shards and the manifest; returns counts for the record.

    A bad record stops the stage before its shard is written; shards already committed are kept and made again only
    where they are missing. ``progress`` gets the number of samples done.
    """
    samples = encode_all(config, encoder)
    counts = {"samples": 0, "tokens": 0, "response_tokens": 0, "truncated": 0, "duplicates": 0}
    seen: set[str] = set()
    present = set(store.names(str(ref)))
    index = 0
    while rows := list(islice(samples, config.shard_rows)):
        if shard_name(index) not in present:
            write_shard(store, ref, SAMPLES, index, _columns(rows), fingerprint)
        counts["samples"] += len(rows)
        counts["tokens"] += sum(len(r.input_ids) for r in rows)
        counts["response_tokens"] += sum(r.response_tokens for r in rows)
        counts["truncated"] += sum(r.truncated for r in rows)
        seen.update(r.sample_id for r in rows)
        index += 1
        progress(counts["samples"])
    counts["duplicates"] = counts["samples"] - len(seen)
    manifest = fold_manifest(store, ref, SAMPLES, index, fingerprint)
    return {**counts, "shards": index, "bytes": sum(s.bytes for s in manifest.shards)}


def _columns(rows: list[EncodedSample]) -> dict[str, list[object]]:
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
    """The rows of a ``samples`` shard."""
    return [
        EncodedSample(
            row["sample_id"],
            row["record"],
            np.frombuffer(row["input_ids"], "<i4"),
            np.frombuffer(row["spans"], "<i4").reshape(-1, 2),
            row["image"],
            truncated=False,
        )
        for row in data.to_pylist()
    ]
