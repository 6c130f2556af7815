"""How long a data set's samples are: by the ``samples`` table where it is finished, else by a part of the records."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from pipeline.data.collate import target_positions
from pipeline.data.conversations import part_conversations
from pipeline.data.encoding import EncodedSample, Encoder
from pipeline.data.images import read_images
from pipeline.data.records import parts
from pipeline.data.samples import decode_samples
from pipeline.shards import read_manifest, read_shard
from pipeline.store import Store
from pipeline.taps import is_tapped
from schemas.artifacts import ArtifactRef
from schemas.config import CacheConfig, PrepareConfig
from schemas.errors import ConfigInvalid, SampleInvalid
from schemas.sections import Positions
from schemas.tables import SAMPLES

T = TypeVar("T")
# Samples looked at of a large table, from so many shards: the mean of lengths that vary by half of it within 0.6 %.
SAMPLES_SEEN, SHARDS_SEEN = 16384, 32
# Records encoded where `prepare` has not run, a few seconds: the mean within 2 %.
RECORDS = 512
# Records that stand together in the file are drawn together: few, because neighbours may be alike.
GROUP = 4
# One seed: the same plan twice.
SEED = 0
KINDS: tuple[Positions, ...] = ("response", "text", "all")


@dataclass(frozen=True)
class Lengths:
    """Totals of a data set, scaled up from the ``seen`` of its ``samples``.

    ``squared_tokens`` is the sum of the samples' squared lengths, ``tapped_tokens`` the tokens of the samples that the
    run taps, and ``positions`` those with a target, by kind.
    """

    samples: int
    seen: int
    tokens: float
    squared_tokens: float
    image_tokens: float
    response_tokens: float
    tapped_tokens: float
    positions: dict[Positions, float]


def measure(rows: Iterable[EncodedSample], samples: int | None, cache: CacheConfig, image_token: int | None) -> Lengths:
    """The totals of ``samples`` samples (as many as there are rows if None) of which ``rows`` are some."""
    table = np.array([_row(row, cache, image_token) for row in rows], np.float64)
    seen, count = len(table), samples or len(table)
    tokens, squared, image, response, tapped, *positions = (table.sum(0) * count / seen).tolist()
    if seen < count:  # which of a part are tapped is chance; the share of all is known
        tapped = tokens * cache.taps.fraction
    by_kind = dict(zip(KINDS, positions, strict=True))
    return Lengths(count, seen, tokens, squared, image, response, tapped, by_kind)


def _row(row: EncodedSample, cache: CacheConfig, image_token: int | None) -> list[int]:
    tokens, taps = len(row.input_ids), cache.taps
    image = 0 if image_token is None else int((row.input_ids == image_token).sum())
    tapped = tokens if is_tapped(row.sample_id, taps.fraction, cache.seed) else 0
    positions = [len(target_positions(kind, row.spans, row.input_ids, image_token)) for kind in KINDS]
    return [tokens, tokens**2, image, row.response_tokens, tapped, *positions]


def prepared_samples(
    store: Store, ref: ArtifactRef, count: int = SAMPLES_SEEN, *, images: bool = False
) -> tuple[list[EncodedSample], int]:
    """About ``count`` samples of a finished ``prepare`` (all, if it has no more), and the number of all of its samples.

    They come in a random order, from shards spread evenly over the table.
    """
    manifest, generator = read_manifest(store, ref), random.Random(SEED)
    few = manifest.rows <= count
    shards = manifest.shards if few else _spread(manifest.shards, SHARDS_SEEN)
    most = -(-count // len(shards))
    columns = [c.name for c in SAMPLES.columns if images or not c.name.startswith("image")]
    rows: list[EncodedSample] = []
    for info in shards:
        data = read_shard(store, ref, SAMPLES, info, columns)
        if data.num_rows > most and not few:
            data = data.take(generator.sample(range(data.num_rows), most))
        rows += decode_samples(data)
    generator.shuffle(rows)
    return rows, manifest.rows


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of the items, evenly over all of them."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def encoded_samples(config: PrepareConfig, encoder: Encoder, count: int = RECORDS) -> tuple[list[EncodedSample], int]:
    """Some of the data file's records, encoded, in a random order, and about how many of all are usable.

    Raises:
        SampleInvalid: the file cannot be read; a record cannot be used and bad ones are not to be skipped; or none can.
        ConfigInvalid: the samples are not the data's, but have the teacher's answers.
    """
    if config.answers:
        raise ConfigInvalid(
            "prepare.answers: how long samples are is known when the teacher has answered; run `decant prepare` first"
        )
    generator, images = random.Random(SEED), Store(config.images)
    groups = parts(config.data, GROUP)
    rows, tried = [], 0
    for part in generator.sample(groups, min(len(groups), -(-count // GROUP))):
        for item in part_conversations(config.data, part):
            tried += 1
            try:
                if isinstance(item, SampleInvalid):
                    raise item
                rows.append(encoder.encode(item, read_images(item, images, truncated=config.truncated_images)))
            except SampleInvalid:
                if config.on_bad_sample == "fail":
                    raise
    if not rows:
        raise SampleInvalid(f"{config.data}: none of {tried} records that were tried can be used")
    generator.shuffle(rows)
    return rows, round(sum(part.count for part in groups) * len(rows) / tried)
