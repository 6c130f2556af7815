"""The ``prepare`` stage's work: parts of a data file to committed shards of the ``samples`` table.

Part and shard have the same number and rows, less what is rejected. What was rejected, and how many samples were cut,
stands in the shard's footer, so that a shard and the account of it are one commit.
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.conversations import Conversation, part_conversations
from pipeline.data.encoding import EncodedSample, Encoder
from pipeline.data.images import read_images
from pipeline.data.records import Part
from pipeline.shards import fold_manifest, notes_of, read_shard, write_shard
from pipeline.store import Store
from schemas.artifacts import ArtifactRef
from schemas.config import PrepareConfig
from schemas.errors import SampleInvalid
from schemas.tables import REJECTS, REJECTS_FILE, SAMPLES

# What `max_length` cut: samples, tokens, supervised tokens.
CUT = ("truncated", "cut_tokens", "cut_response_tokens")
# A record that cannot be used: its number in the file, from 0, and why.
Reject = tuple[int, str]
# Gives conversations, with their image files, answers, or says why it cannot; the number tells shards apart.
Answers = Callable[[Sequence[tuple[Conversation, tuple[bytes, ...]]], int], list[Conversation | SampleInvalid]]
T = TypeVar("T")


def prepare_shard(
    store: Store,
    ref: ArtifactRef,
    config: PrepareConfig,
    encoder: Encoder,
    part: Part,
    index: int,
    fingerprint: str,
    answer: Answers | None = None,
) -> int:
    """Encodes a part of the data file and commits it as shard ``index``; returns its number of records.

    ``answer`` gives all the part's conversations the teacher's answers, where that is wanted.

    Raises:
        SampleInvalid: the file cannot be read; or a record cannot be used, and those are not to be skipped.
    """
    images = Store(config.images)
    found: dict[int, tuple[Conversation, tuple[bytes, ...]]] = {}
    rows: list[EncodedSample] = []
    rejects: dict[int, str] = {}

    def tried(number: int, work: Callable[[], T]) -> T | None:
        """What the work makes of a record, None where that is rejected."""
        try:
            return work()
        except SampleInvalid as error:
            if config.on_bad_sample == "fail":
                raise
            # without the folders, which are the run's and not the record's
            rejects[number] = str(error).removeprefix(f"{config.data}: ").replace(f"{images.root}/", "")
            return None

    for number, item in enumerate(part_conversations(config.data, part, answered=answer is None), part.first):
        if (taken := tried(number, partial(_read, item, images, config))) is not None:
            found[number] = taken
    asked = list(found.values())
    answered = [c for c, _ in asked] if answer is None else answer(asked, index)
    for (number, (_, files)), item in zip(found.items(), answered, strict=True):
        row = tried(number, partial(_encoded, encoder, item, files))
        rows += [] if row is None else [row]
    notes = {
        "rejects": json.dumps(sorted(rejects.items())),
        "truncated": str(sum(r.cut > 0 for r in rows)),
        "cut_tokens": str(sum(r.cut for r in rows)),
        "cut_response_tokens": str(sum(r.cut_response for r in rows)),
    }
    write_shard(store, ref, SAMPLES, index, sample_columns(rows), fingerprint, notes)
    return part.count


def _read(
    item: Conversation | SampleInvalid, images: Store, config: PrepareConfig
) -> tuple[Conversation, tuple[bytes, ...]]:
    conversation = _usable(item)
    return conversation, read_images(conversation, images, truncated=config.truncated_images)


def _encoded(encoder: Encoder, item: Conversation | SampleInvalid, images: tuple[bytes, ...]) -> EncodedSample:
    return encoder.encode(_usable(item), images)


def _usable(item: Conversation | SampleInvalid) -> Conversation:
    if isinstance(item, SampleInvalid):
        raise item
    return item


def finish(store: Store, ref: ArtifactRef, config: PrepareConfig, count: int, fingerprint: str) -> dict[str, Any]:
    """Writes the rejects and the manifest of ``count`` committed shards; returns counts for the record.

    Raises:
        SampleInvalid: no record could be used.
    """
    manifest = fold_manifest(store, ref, SAMPLES, count, fingerprint)
    counts = {"samples": manifest.rows, "tokens": 0, "response_tokens": 0, **dict.fromkeys(CUT, 0)}
    seen: set[str] = set()
    rejects: list[Reject] = []
    for info in manifest.shards:
        data = read_shard(store, ref, SAMPLES, info, ["sample_id", "tokens", "response_tokens"])
        notes = notes_of(data.schema.metadata)
        counts["tokens"] += sum(data["tokens"].to_pylist())
        counts["response_tokens"] += sum(data["response_tokens"].to_pylist())
        for name in CUT:
            counts[name] += int(notes[name])
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
        "images": [b"".join(r.images) for r in rows],
        "image_bytes": [np.array([len(i) for i in r.images], "<i8").tobytes() for r in rows],
    }


def images_of(row: Mapping[str, Any]) -> tuple[bytes, ...]:
    """The image files of a row of ``samples``."""
    stops = np.cumsum(np.frombuffer(row["image_bytes"], "<i8")).tolist()
    return tuple(bytes(row["images"][start:stop]) for start, stop in zip([0, *stops], stops, strict=False))


def decode_samples(data: pa.Table) -> list[EncodedSample]:
    """The rows of a ``samples`` shard, read with or without their images."""
    return [
        EncodedSample(
            row["sample_id"],
            row["record"],
            np.frombuffer(row["input_ids"], "<i4"),
            np.frombuffer(row["spans"], "<i4").reshape(-1, 2),
            images_of(row) if "images" in row else (),
        )
        for row in data.to_pylist()
    ]
