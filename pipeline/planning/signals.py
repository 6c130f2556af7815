"""What each signal of the teacher would take on disk: bytes by the layout of the ``targets`` table."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import log2

import numpy as np

from pipeline.planning.compute import ModelSize
from pipeline.planning.lengths import KINDS, Lengths
from pipeline.shards import shard_bytes
from pipeline.targets import UINT16_IDS
from schemas.config import CacheConfig, FinalHiddenTargets, SampledTargets, TapsConfig, TargetsConfig, TopKTargets
from schemas.sections import Positions
from schemas.tables import Table, tap_columns, targets_table

# Distinct ids of 50 draws a position, where no probe has counted them, and how they grow with the draws (a power law).
# Ordinary text: arXiv 2503.16870. Answers of fine-tuning data are surer: 0.8 nats on average give about 5.
UNIQUE: dict[Positions, float] = {"response": 5.0, "text": 12.1, "all": 12.1}
UNIQUE_DRAWS, UNIQUE_GROWTH = 50, 0.64
# A row's 32 hexadecimal digits hold 16 bytes, which is what zstd leaves of them, and some framing.
SAMPLE_ID = 18.0
# A value's length takes 4 bytes, of which zstd leaves about one.
VALUE = 1.0
# What zstd leaves of the small columns, over 20,000 positions of the demo; ids keep the bits that a vocabulary has.
FLOATS = 0.87
DENSITY = {"counts": 0.45, "n_unique": 0.6}
# What a shard holds beside its values does not grow with them: so many bytes stand for more.
ENOUGH = 4096
FINGERPRINT = "0" * 32


@dataclass(frozen=True)
class Signal:
    """One thing to cache: its bytes over the data set, and at how many positions the head runs for it.

    ``own`` marks what this run's cache writes; ``fraction`` is the share of the samples, of taps only; ``spared`` the
    share of the teacher's pass that it takes the place of.
    """

    group: str
    name: str
    bytes: float
    head_positions: float
    own: bool = False
    fraction: float | None = None
    spared: float = 1.0


def signals(
    size: ModelSize,
    lengths: Lengths,
    cache: CacheConfig,
    rows: int,
    tapped: tuple[int, ...],
    replaced: tuple[int, ...],
    correction: float = 1.0,
) -> list[Signal]:
    """Every signal to compare: targets at the run's positions, then at the others; taps of the run, then all of them.

    Last come vision features, where they can be cached. ``rows`` are those of a shard, ``tapped`` and ``replaced``
    layers of the run. ``correction`` is what the rows of the run's own targets take over ``row_bytes``, where that has
    been measured.
    """
    shards = -(-lengths.samples // rows)
    own_first = [cache.positions, *(k for k in KINDS if k != cache.positions)]
    found = [s for positions in own_first for s in _targets(size, lengths, cache, positions, shards, correction)]
    return [*found, *_taps(size, lengths, cache, shards, tapped, replaced), *_vision(size, lengths, cache)]


def _targets(
    size: ModelSize, lengths: Lengths, cache: CacheConfig, positions: Positions, shards: int, correction: float
) -> Iterator[Signal]:
    own = cache.targets
    choices: tuple[TargetsConfig, ...] = (
        own if own.kind == "sampled" else SampledTargets(),
        own if own.kind == "top_k" else TopKTargets(kind="top_k"),
        FinalHiddenTargets(kind="final_hidden"),
        FinalHiddenTargets(kind="final_hidden", dtype="fp8_e4m3"),
    )
    group, count = f"targets at {positions} positions", lengths.positions[positions]
    for choice in choices:
        config = cache.model_copy(update={"targets": choice, "positions": positions})
        mine = positions == cache.positions and _same(choice, own)
        in_rows = row_bytes(size, lengths, config) * (correction if mine else 1.0)
        on_disk = in_rows + shards * shard_overhead(size, lengths, config)
        yield Signal(group, _name(choice), on_disk, count, mine)
    yield Signal(group, "full logits bfloat16", 2.0 * size.vocabulary * count, count)


def _same(one: TargetsConfig, other: TargetsConfig) -> bool:
    """Whether they take the same bytes, which the temperature does not change."""
    return one.model_dump(exclude={"temperature"}) == other.model_dump(exclude={"temperature"})


def _name(choice: TargetsConfig) -> str:
    if choice.kind == "sampled":
        return f"sampled, {choice.draws} draws"
    return f"top_k, k = {choice.k}" if choice.kind == "top_k" else f"final_hidden {choice.dtype.partition('_')[0]}"


def row_bytes(size: ModelSize, lengths: Lengths, cache: CacheConfig) -> float:
    """Bytes that the rows of the data set take in a cache without taps and vision features."""
    columns = _plain_table(cache, ()).columns
    values = sum(total * _density(name, size) for name, total in _values(size, lengths, cache).items())
    return values + lengths.samples * (SAMPLE_ID + VALUE * (len(columns) - 1))


def _plain_table(cache: CacheConfig, tapped: tuple[int, ...]) -> Table:
    """The table without vision features, which are a signal of their own."""
    return targets_table(cache.model_copy(update={"vision": "none"}), tapped)


def _density(name: str, size: ModelSize) -> float:
    """The share of a column's bytes that compression leaves."""
    if name == "ids":
        return log2(size.vocabulary) / (8 * _id_bytes(size))
    return 1.0 if name == "hidden" else DENSITY.get(name, FLOATS)


def _id_bytes(size: ModelSize) -> int:
    return 2 if size.vocabulary <= UINT16_IDS else 4


def shard_overhead(size: ModelSize, lengths: Lengths, cache: CacheConfig, tapped: tuple[int, ...] = ()) -> int:
    """Bytes of a shard beside its rows, vision features left out, by writing one with a row of the mean lengths."""
    totals = _values(size, lengths, cache) | _tap_values(size, lengths.tokens, cache.taps, tapped)
    a_row = {name: round(total / lengths.samples) for name, total in totals.items()}
    return _overhead(_plain_table(cache, tapped), a_row)


def _overhead(table: Table, values: Mapping[str, int]) -> int:
    noise = np.random.default_rng(0)  # as hard to compress as most values are
    payload = {name: noise.bytes(min(length, ENOUGH)) for name, length in values.items()}
    texts = {"sample_id": "0" * 32, "ids_dtype": "uint16", "positions": 1}
    columns: dict[str, list[object]] = {c.name: [payload.get(c.name, texts.get(c.name))] for c in table.columns}
    return len(shard_bytes(table, 0, columns, FINGERPRINT)) - sum(map(len, payload.values()))


def _values(size: ModelSize, lengths: Lengths, cache: CacheConfig) -> dict[str, float]:
    """Bytes of the data set's values by column, not compressed; see ``pipeline.targets``."""
    config, count = cache.targets, lengths.positions[cache.positions]
    an_id = 1.0 * _id_bytes(size)
    if config.kind == "sampled":
        unique = UNIQUE[cache.positions] * (config.draws / UNIQUE_DRAWS) ** UNIQUE_GROWTH
        unique = min(max(unique, 1.0), config.draws, size.vocabulary)
        kept = {"ids": an_id * unique, "counts": unique, "n_unique": 1.0}
    elif config.kind == "top_k":
        k = min(config.k, size.vocabulary)
        kept = {"ids": an_id * k, "logprobs": 2.0 * k}
    elif config.dtype == "bfloat16":
        kept = {"hidden": 2.0 * size.hidden}
    else:
        kept = {"hidden": 1.0 * size.hidden, "hidden_scale": 4.0}
    kept |= {"lse": 4.0, "gold_logprob": 2.0, "entropy": 2.0}
    return {name: a_position * count for name, a_position in kept.items()}


def _tap_values(size: ModelSize, tokens: float, taps: TapsConfig, layers: tuple[int, ...]) -> dict[str, float]:
    """Bytes of so many tokens' taps by column; see ``pipeline.activations``."""
    wide, scale = size.hidden * (2.0 if taps.dtype == "bfloat16" else 1.0), 4.0
    names = [c.name for layer in layers for c in tap_columns(layer, taps)]
    return {name: tokens * (scale if name.endswith("_scale") else wide) for name in names}


def _taps(
    size: ModelSize,
    lengths: Lengths,
    cache: CacheConfig,
    shards: int,
    tapped: tuple[int, ...],
    replaced: tuple[int, ...],
) -> Iterator[Signal]:
    taps = cache.taps
    group = f"{'inputs' if taps.targets == 'recompute' else 'inputs and outputs'}, {taps.dtype.partition('_')[0]}"
    if tapped:
        columns = shard_overhead(size, lengths, cache, tapped) - shard_overhead(size, lengths, cache)
        own = sum(_tap_values(size, lengths.tapped_tokens, taps, tapped).values()) + shards * columns
        name = f"{len(tapped)} layers, {100 * taps.fraction:.3g} % of samples"
        yield Signal(group, name, own, 0.0, own=True, fraction=taps.fraction)
    for which, layers in (("replaced", replaced), ("all", tuple(range(size.layers)))):
        whole = sum(_tap_values(size, lengths.tokens, taps, layers).values())
        yield Signal(group, f"{which} {len(layers)} layers", whole, 0.0, fraction=1.0)


def _vision(size: ModelSize, lengths: Lengths, cache: CacheConfig) -> Iterator[Signal]:
    if not size.features or not lengths.image_tokens:
        return
    # two columns' framing, 0.3 KB a shard, does not count beside one image's features
    total, tower = 2.0 * size.features * lengths.image_tokens, size.vision_flops(lengths)
    spared = tower / size.pass_flops(lengths, 0.0)
    own = cache.vision != "none"
    yield Signal("vision features, bfloat16", "the connector's input", total, 0.0, own=own, spared=spared)
