"""The journal of an unfinished artifact: what happened while it is made, written by whoever it happens to.

Entries are small objects below ``{ref}/journal/{command}/`` that no one else overwrites, so that any number of
processes write at once and any may die. An entry's name says when, what, on which host and by which process: one
listing tells nearly everything, and nothing is held in a driver or an actor. Once the artifact is finished its record
has the journal's summary (``history``), and the folder is removed.
"""

import json
import os
import re
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from pipeline.store import Store
from schemas.artifacts import ArtifactRef
from schemas.errors import DecantError, StoreUnavailable, WorkersLost
from schemas.manifest import shard_name

FOLDER = "journal"
# Seconds between two signs of life of a command: a request a minute is no cost, and nobody waits longer to know.
BEAT = 60.0
# Of the error that ended a command: a message of ours is shorter, and a foreign one says it at its beginning.
LONGEST = 2000
# Of what a record keeps: enough for any run that is still a run, and a record stays some kilobytes.
MOST = 100
NAME = re.compile(r"(?P<at>\d{16})_(?P<kind>[a-z]+)(?:-(?P<shard>\d{6,}))?_(?P<host>[^_]+)_(?P<pid>\d+)_[0-9a-f]{8}")


@dataclass(frozen=True)
class Entry:
    """One thing that happened, as its name tells it: ``at`` in seconds since the epoch, by the writer's clock."""

    path: str
    at: float
    kind: str
    shard: int | None
    host: str


@dataclass(frozen=True)
class Command:
    """The entries of one command, in order; ``started`` in seconds since the epoch."""

    name: str
    entries: tuple[Entry, ...]

    @property
    def started(self) -> float:
        """When the command began."""
        return int(self.name.partition("-")[0]) / 1e6

    def of(self, kind: str) -> list[Entry]:
        """The entries of a kind."""
        return [entry for entry in self.entries if entry.kind == kind]

    def attempts(self) -> Counter[int]:
        """How often each shard was begun."""
        return Counter(entry.shard for entry in self.entries if entry.shard is not None)

    @property
    def hosts(self) -> list[str]:
        """The hosts on which anything of the command ran."""
        return sorted({entry.host for entry in self.entries})


class Journal:
    """One command's part of an artifact's journal; where ``command`` is None nothing is noted (probes, audits)."""

    def __init__(self, store: Store, ref: ArtifactRef, command: str | None) -> None:
        self.store, self.ref, self.command = store, ref, command

    def note(self, kind: str, shard: int | None = None, **facts: Any) -> None:
        """Adds an entry: begun, todo, worker, shard (with its index), lost, failed or stopped.

        ``facts`` that are not None are its content. Without any the name is all of it, which on local disk is a file
        that is not synced.
        """
        if self.command is None:
            return
        what = kind if shard is None else f"{kind}-{shard:06d}"
        host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())
        unique = f"{_now()}_{what}_{host}_{os.getpid()}_{uuid.uuid4().hex[:8]}"
        name = f"{self.ref}/{FOLDER}/{self.command}/{unique}"
        if known := {key: value for key, value in facts.items() if value is not None}:
            self.store.write(name, json.dumps(known).encode())
        else:
            self.store.touch(name)

    def read(self) -> Command:
        """What the command, with all its workers, has noted so far."""
        assert self.command is not None
        names = self.store.names(f"{self.ref}/{FOLDER}/{self.command}")
        return Command(self.command, tuple(_entries(f"{FOLDER}/{self.command}/{name}" for name in names)))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Signs of life while the block runs, and a last entry where it ends with an error."""
        ended = threading.Event()
        pulse = threading.Thread(target=self._beat, args=(ended,), daemon=True)
        pulse.start()
        try:
            yield
        except BaseException as error:
            ended.set()
            pulse.join()
            self._end(error)
            raise
        finally:
            ended.set()
            pulse.join()

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(BEAT):
            with suppress(StoreUnavailable):  # who works notices by himself
                self.store.touch(f"{self.ref}/{FOLDER}/{self.command}/alive")

    def _end(self, error: BaseException) -> None:
        with suppress(StoreUnavailable):  # it may be what went wrong
            if not self.store.exists(self.ref.identity_path):
                clear(self.store, self.ref)  # the stage took back all that it had begun
            elif isinstance(error, Exception):
                self.note("failed", error=told(error))
            else:
                self.note("stopped")


def _now() -> str:
    """Microseconds since the epoch, so wide that names sort by time; milliseconds would have ties in one process."""
    return f"{time.time_ns() // 1000:016d}"


def begin(store: Store, ref: ArtifactRef, job: str | None) -> Journal:
    """The journal of a command that begins now; ``job`` is what Ray calls it where it was submitted."""
    journal = Journal(store, ref, f"{_now()}-{uuid.uuid4().hex[:8]}")
    journal.note("begun", job=job)
    return journal


def clear(store: Store, ref: ArtifactRef) -> None:
    """Removes the journal of an artifact that is finished, if there is one."""
    store.remove(f"{ref}/{FOLDER}")


def told(error: BaseException) -> str:
    """An error as it is written down: our own whole, of another its type and first line."""
    lines = [str(error)] if isinstance(error, DecantError) else str(error).strip().splitlines()[:1]
    return f"{type(error).__name__}: {''.join(lines)}"[:LONGEST]


class Attempts:
    """One worker's part of the journal: it says that it started and what it begins, and ends what never ends.

    Ray starts a worker again for as long as it dies. A shard that was begun ``retries`` + 1 times by one command and
    is not there is not begun again; neither do workers start for ever that die before they begin anything. A worker
    looks at what others began when it starts: whoever does a dead one's work has started after its death.
    """

    def __init__(self, journal: Journal, retries: int, workers: int) -> None:
        """``workers`` is how many there are at once, 0 where it is the command's own process.

        Raises:
            WorkersLost: none of the last ones lived long enough to begin a shard.
        """
        self.journal, self.retries = journal, retries
        self.begun: Counter[int] = Counter()
        if journal.command is None:
            return
        journal.note("worker")
        found = journal.read()
        self.begun = found.attempts()
        last = max((entry.at for entry in found.of("shard")), default=0.0)
        idle = [entry for entry in found.of("worker") if entry.at > last]
        if len(idle) > retries + max(1, workers):
            raise WorkersLost(
                f"{journal.ref}: {len(idle) - 1} workers (on {_hosts(idle)}) ended without an error before they had "
                f"begun a shard; {self._remedy()}"
            )

    def begin(self, shard: int) -> None:
        """Notes that the shard is begun.

        Raises:
            WorkersLost: it was too often; names it and those that were begun as often beside it.
        """
        if self.journal.command is None:
            return
        name = shard_name(shard)
        if self.begun[shard] > self.retries and not self.journal.store.exists(f"{self.journal.ref}/{name}"):
            raise WorkersLost(self._verdict(shard))
        self.begun[shard] += 1
        self.journal.note("shard", shard)

    def _verdict(self, shard: int) -> str:
        found = self.journal.read()
        counts, there = found.attempts(), set(self.journal.store.names(str(self.journal.ref)))
        beside = [shard_name(i) for i in sorted(counts) if i != shard and counts[i] >= counts[shard]]
        beside = [name for name in beside if name not in there]
        others = f", as those computed beside it ({', '.join(beside[:5])})" if beside else ""
        where = _hosts(entry for entry in found.entries if entry.shard == shard)
        return (
            f"{self.journal.store.path(f'{self.journal.ref}/{shard_name(shard)}')}: was begun {counts[shard]} times by "
            f"this command (on {where}) and never committed{others}: each time its worker ended without an error; "
            f"{self._remedy()}"
        )

    def _remedy(self) -> str:
        place = f"placement.{self.journal.ref.kind}"
        return (
            "most likely it was killed for want of memory, or its node was lost. Lower "
            f"{place}.batch or give a worker more memory, or raise {place}.retries ({self.retries}) where nodes come "
            "and go, and run the same command again: it goes on with what is missing, and counts anew"
        )


def _hosts(entries: Iterable[Entry]) -> str:
    return ", ".join(sorted({entry.host for entry in entries}))


def commands(paths: Iterable[str]) -> list[Command]:
    """The commands that a listing of an artifact (paths within it) tells of, in order."""
    found: dict[str, list[Entry]] = {}
    for path in paths:
        if path.startswith(f"{FOLDER}/") and path.count("/") == 2:
            found.setdefault(path.split("/")[1], []).extend(_entries([path]))
    return [Command(name, tuple(found[name])) for name in sorted(found) if found[name]]


def _entries(paths: Iterable[str]) -> Iterator[Entry]:
    for path in sorted(paths):
        match = NAME.fullmatch(path.rpartition("/")[2])
        if match:
            shard = None if match["shard"] is None else int(match["shard"])
            yield Entry(path, int(match["at"]) / 1e6, match["kind"], shard, match["host"])


def facts(store: Store, ref: ArtifactRef, command: Command, kind: str) -> list[dict[str, Any]]:
    """What the entries of a kind say beyond their names."""
    return [json.loads(store.read(f"{ref}/{entry.path}") or b"{}") for entry in command.of(kind)]


def history(store: Store, ref: ArtifactRef, own: Journal) -> dict[str, Any]:
    """The journal's summary for the record of the artifact that the command of ``own`` is about to finish."""
    found = commands(f"{FOLDER}/{path}" for path in store.sizes(f"{ref}/{FOLDER}"))
    attempts = sum((command.attempts() for command in found), Counter[int]())
    again = [(shard_name(shard), count) for shard, count in attempts.most_common() if count > 1]
    return {
        "commands": [_summary(store, ref, command, own) for command in found[-MOST:]],
        "shards_begun_again": dict(again[:MOST]),
    }


def _summary(store: Store, ref: ArtifactRef, command: Command, own: Journal) -> dict[str, Any]:
    ends = [kind for kind in ("failed", "stopped") if command.of(kind)]
    ended = time.time() if command.name == own.command else command.entries[-1].at
    said = [fact for kind in ("begun", "failed") for fact in facts(store, ref, command, kind)]
    lost = zip(command.of("lost"), facts(store, ref, command, "lost"), strict=True)
    replaced = [{"at": entry.at, **fact} for entry, fact in lost]
    return {
        "started": command.started,
        "seconds": round(ended - command.started, 3),
        "outcome": "done" if command.name == own.command else ends[0] if ends else "killed",
        "hosts": command.hosts,
        "workers": len(command.of("worker")),
        **{name: value for fact in said for name, value in fact.items()},
        **({"lost": replaced[-MOST:]} if replaced else {}),
    }
