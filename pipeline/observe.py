"""What can be seen of a stage from the store alone, wherever it runs: one listing, and a few small objects.

That a command still runs can only be inferred: from its signs of life, which are whatever it wrote last.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.journal import BEAT, Command, commands, facts
from pipeline.shards import read_manifest
from pipeline.stage import read_record
from pipeline.store import Committed, Store
from schemas.artifacts import CHECKPOINTS, LOG, ArtifactRecord, ArtifactRef
from schemas.errors import ShardCorrupt, StoreUnavailable
from schemas.manifest import MANIFEST, is_shard, shard_name

State = Literal["not begun", "running", "stopped", "failed", "done"]
# Seconds without a sign of life after which a command counts as dead: three beats, as one may be late or lost.
SILENCE = 3 * BEAT
SHARD = re.compile(r"shard-(\d{6,})\.parquet")
# What a training's log says of the losses, besides the layers'.
LOSSES = ("loss", "kl", "ce", "held_out_kl")


@dataclass(frozen=True)
class Shards:
    """Shards of ``total`` (None while unknown), by what became of them; samples where they are known.

    ``failed`` were begun more than once by the last command and are not there, or its error names them. ``rate`` is the
    last command's in shards a second, from when it committed its first.
    """

    done: int
    total: int | None
    failed: tuple[int, ...] = ()
    again: int = 0
    samples: int | None = None
    of_samples: int | None = None
    rate: float | None = None

    @property
    def pending(self) -> int | None:
        """Shards that are neither there nor failed."""
        return None if self.total is None else self.total - self.done - len(self.failed)

    @property
    def seconds_left(self) -> float | None:
        """At the rate so far."""
        return (self.total - self.done) / self.rate if self.total is not None and self.rate else None


@dataclass(frozen=True)
class Training:
    """Where a training stands by its log: steps of the phase and of all phases, losses of the last steps, speed."""

    phase: int
    kind: str
    step: int
    steps: int
    done: int
    total: int
    losses: dict[str, float]
    tokens_per_second: float
    seconds_left: float
    checkpoint: str | None


@dataclass(frozen=True)
class Seen:
    """One stage: ``silent`` is for how many seconds nothing was written, ``result`` that of the record.

    ``workers`` started and groups of workers ``lost`` are the last command's, once done those of all ``commands``.
    """

    stage: str
    artifact: str
    state: State
    silent: float | None = None
    commands: int = 0
    workers: int = 0
    lost: int = 0
    job: str | None = None
    error: str | None = None
    seconds: float | None = None
    shards: Shards | None = None
    training: Training | None = None
    result: dict[str, Any] | None = None


def observe(store: Store, ref: ArtifactRef, samples: ArtifactRef | None = None) -> Seen:
    """What is seen of an artifact; ``samples`` is the artifact whose shards its own follow one by one."""
    try:
        record = read_record(store, ref)
    except ShardCorrupt as error:
        return Seen(ref.kind, str(ref), "failed", error=str(error))
    if record is not None:
        return _finished(ref, record)
    found = store.listing(str(ref))
    if not found:
        return Seen(ref.kind, str(ref), "not begun")
    try:
        return _unfinished(store, ref, found, samples)
    except StoreUnavailable:
        if found.keys() <= store.listing(str(ref)).keys():
            raise
    return observe(store, ref, samples)  # the command ended meanwhile, and took its journal away


def _unfinished(store: Store, ref: ArtifactRef, found: Mapping[str, Committed], samples: ArtifactRef | None) -> Seen:
    begun = commands(found)
    last = begun[-1] if begun else None
    silent = max(0.0, time.time() - max(entry.modified for entry in found.values()))
    said = {} if last is None else _said(store, ref, last)
    return Seen(
        ref.kind,
        str(ref),
        _state(last, silent),
        silent=silent,
        commands=len(begun),
        workers=len(last.of("worker")) if last else 0,
        lost=len(last.of("lost")) if last else 0,
        job=said.get("job"),
        error="stopped by hand" if last and last.of("stopped") else said.get("error"),
        shards=_shards(store, found, last, said, samples) if ref.kind in ("prepare", "cache") else None,
        training=_training(store, ref, found) if LOG in found else None,
    )


def _said(store: Store, ref: ArtifactRef, command: Command) -> dict[str, Any]:
    """What the last command said of itself, besides names."""
    every = [fact for kind in ("begun", "todo", "failed") for fact in facts(store, ref, command, kind)]
    return {name: value for fact in every for name, value in fact.items()}


def _state(last: Command | None, silent: float) -> State:
    if last and last.of("failed"):
        return "failed"
    return "stopped" if silent > SILENCE or (last and last.of("stopped")) else "running"


def _finished(ref: ArtifactRef, record: ArtifactRecord) -> Seen:
    result, made = record.result, record.provenance
    told = made.get("history", {"commands": [], "shards_begun_again": {}})  # older records have none
    shards = None
    if ref.kind in ("prepare", "cache"):
        again, count, rows = len(told["shards_begun_again"]), result.get("shards"), result.get("samples")
        shards = None if count is None else Shards(count, count, again=again, samples=rows, of_samples=rows)
    return Seen(
        ref.kind,
        str(ref),
        "done",
        commands=len(told["commands"]),
        workers=sum(command["workers"] for command in told["commands"]),
        lost=sum(len(command.get("lost", ())) for command in told["commands"]),
        seconds=made["seconds"],
        shards=shards,
        result=result,
    )


def _shards(
    store: Store,
    found: Mapping[str, Committed],
    last: Command | None,
    said: Mapping[str, Any],
    samples: ArtifactRef | None,
) -> Shards:
    done = {name for name in found if is_shard(name)}
    attempts = last.attempts() if last else Counter[int]()
    failed = {i for i, count in attempts.items() if count > 1} | set(map(int, SHARD.findall(said.get("error", ""))))
    rows = _rows(store, samples)
    total = said.get("shards", len(rows) or None)
    return Shards(
        len(done),
        total,
        tuple(sorted(i for i in failed if shard_name(i) not in done and (total is None or i < total))),
        sum(count > 1 for count in attempts.values()),
        sum(rows[name] for name in done if name in rows) if rows else None,
        sum(rows.values()) if rows else None,
        _rate(found[name].modified for name in done if last and found[name].modified >= int(last.started)),
    )


def _rows(store: Store, samples: ArtifactRef | None) -> dict[str, int]:
    if samples is None or not store.exists(f"{samples}/{MANIFEST}"):
        return {}
    return {shard.name: shard.rows for shard in read_manifest(store, samples).shards}


def _rate(times: Iterable[float]) -> float | None:
    """Commits a second since the first one: what comes before it is starts and loading, which do not come again."""
    moments = sorted(times)
    if len(moments) < 2 or moments[-1] <= moments[0]:
        return None
    return (len(moments) - 1) / (moments[-1] - moments[0])


def _training(store: Store, ref: ArtifactRef, found: Mapping[str, Committed]) -> Training:
    entry = json.loads(store.read(f"{ref}/{LOG}").splitlines()[-1])
    checkpoints = [name.removeprefix(f"{CHECKPOINTS}/") for name in found if name.startswith(f"{CHECKPOINTS}/")]
    layers = [value for name, value in entry.items() if name.startswith("layer_")]
    losses = {name: entry[name] for name in LOSSES if name in entry}
    return Training(
        entry["phase"],
        entry["kind"],
        entry["step"],
        entry["steps"],
        entry["done"],
        entry["total"],
        {**losses, **({"layer": _mean(layers)} if layers else {})},
        entry["tokens_per_second"],
        (entry["total"] - entry["done"]) / max(entry["steps_per_second"], 1e-9),
        max(checkpoints, default="").partition(".")[0] or None,
    )


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 6)
