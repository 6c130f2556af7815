"""The ``cache`` stage as it runs, watched: Ray Data, decoding tasks, teacher actors, shards on local disk.

The stage's own dataset (``jobs.cache.committed``), with the two functions that it calls replaced by ones that note in
files what they did and when. Owns those notes and what follows of them: rates between commits, the time that each
teacher's device was busy by its own clock, and what decoding costs.

Decoders may not run ahead of the commits by more than ``LEAD`` shards a worker, as in a run of thousands of shards,
where the object store bounds them: what is measured was decoded while the teachers computed.
"""

import itertools
import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import pyarrow as pa
import torch

import jobs.cache
from jobs.cache import CALLS, CacheJob, TeacherActor, decode_shard
from pipeline.models import body
from pipeline.shards import write_shard
from schemas.manifest import shard_name

# Shards of each worker before those that count: every call has computed and written one, and the device's plans for
# the batches' lengths, which are the same in all shards, are made.
WARM = CALLS + 1
# Two that wait for each decoder of the default placement, beside those in the teacher's calls.
LEAD = CALLS + 4
NOTES = "notes"
# Milliseconds between nvidia-smi's readings, each of which says whether any kernel ran in its own last period.
SAMPLING = 100
Span = tuple[float, float]
# When, of which GPU by its id, and the share.
Reading = tuple[float, str, float]


def _note(job: CacheJob, kind: str, **values: Any) -> None:
    """Adds a line to this process's notes."""
    path = Path(job.store.url, NOTES, str(job.targets).replace("/", "-"), f"{kind}-{os.getpid()}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(values) + "\n")


def notes(job: CacheJob, kind: str) -> list[dict[str, Any]]:
    """What all processes noted, each line with the ``process``."""
    folder = Path(job.store.url, NOTES, str(job.targets).replace("/", "-"))
    found = []
    for file in sorted(folder.glob(f"{kind}-*.jsonl")):
        process = file.stem.removeprefix(f"{kind}-")
        found += [json.loads(line) | {"process": process} for line in file.read_text().splitlines()]
    return found


def watched_decode(row: pa.Table, job: CacheJob) -> pa.Table:
    """``decode_shard``, which waits until the commits are near and notes its seconds."""
    behind = row["shard"][0].as_py() - LEAD * job.place.workers
    before = Path(job.store.url, str(job.targets), shard_name(behind)) if behind >= 0 else None
    while before and not before.exists():
        time.sleep(0.01)
    started = time.perf_counter()
    decoded = decode_shard(row, job)
    _note(job, "decode", seconds=time.perf_counter() - started, bytes=decoded.nbytes)
    return decoded


class Clock:
    """Moments in the order of a device's work, as seconds of the machine's clock."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.synchronize(device)
        self.base, self.zero = time.time(), self.now()

    def now(self) -> Any:
        """The moment at which the device has done what has been queued."""
        if not self.cuda:
            return time.time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, moment: Any) -> float:
        """The moment, which has passed."""
        return self.base + self.zero.elapsed_time(moment) / 1000 if self.cuda else float(moment)


class WatchedTeacher(TeacherActor):
    """A teacher worker that notes when it committed what, and when its device computed.

    The device counts as busy from the first kernel of a batch's forward, its inputs being there, to the last of what
    capture takes of it; as idle while it waits for inputs and copies them.
    """

    def __init__(self, job: CacheJob) -> None:
        super().__init__(job)
        self.clock, self.spans, self.lock = Clock(self.teacher.device), list[list[Any]](), Lock()
        body(self.teacher.model).register_forward_pre_hook(lambda *_: self._begin())
        self.gpu = str(torch.cuda.get_device_properties(0).uuid) if self.clock.cuda else ""
        self.forward, self.inputs = self.teacher.forward, self.teacher.inputs
        self.teacher.forward, self.teacher.inputs = self._forward, self._inputs  # type: ignore[method-assign]
        jobs.cache.write_shard = self._write

    def __call__(self, row: pa.Table) -> pa.Table:
        """As the teacher; notes the commit, and the spans that have passed."""
        done = super().__call__(row)
        with self.lock:
            passed = [s for s in self.spans if len(s) == 2 and (not self.clock.cuda or s[1].query())]
            self.spans = [s for s in self.spans if s not in passed]
            _note(self.job, "commit", shard=done["shard"][0].as_py(), time=time.time(), gpu=self.gpu)
            _note(self.job, "busy", spans=[[self.clock.seconds(moment) for moment in span] for span in passed])
        return done

    def _write(self, *arguments: Any) -> None:
        started = time.perf_counter()
        write_shard(*arguments)
        _note(self.job, "write", seconds=time.perf_counter() - started)

    def _begin(self) -> None:
        """A batch's inputs are there."""
        with self.lock:
            self.spans.append([self.clock.now()])

    def _inputs(self, batch: Any) -> Any:
        self._end()
        return self.inputs(batch)

    def _forward(self, samples: Any) -> Any:
        captured = self.forward(samples)
        self._end()
        return captured

    def _end(self) -> None:
        """The batch before has been queued whole."""
        with self.lock:
            if self.spans and len(self.spans[-1]) == 1:
                self.spans[-1].append(self.clock.now())


@dataclass(frozen=True)
class Seen:
    """What one run of the stage showed; all shards are alike.

    What counts begins when the devices have done the warm shards and ends with the last commit: every shard that counts
    was computed in that time and written in it, so that no rate is above what the device can do.
    ``commits``, ``decodes`` and ``writes`` are notes, the commits in their order; ``busy`` when each worker's device
    computed, a span a forward; ``smi`` the readings of nvidia-smi, of all devices: shares of its period in which any
    kernel was there.
    """

    workers: int
    tokens: int
    commits: list[dict[str, Any]]
    decodes: list[dict[str, Any]]
    writes: list[dict[str, Any]]
    busy: dict[str, list[Span]]
    smi: list[Reading]
    disk: int

    def done(self, spans: Iterable[Span], shards: int) -> float:
        """When so many shards had been computed of those whose forwards these are."""
        forwards, rest = divmod(sum(map(len, self.busy.values())), len(self.commits))
        assert not rest, "all shards have as many forwards"
        return sorted(end for _, end in spans)[shards * forwards - 1]

    @property
    def window(self) -> Span:
        """From when to when."""
        spans = itertools.chain.from_iterable(self.busy.values())
        return self.done(spans, self.workers * WARM), self.commits[-1]["time"]

    @property
    def rate(self) -> float:
        """Tokens a second of all workers."""
        begin, end = self.window
        return self.tokens * (len(self.commits) - self.workers * WARM) / (end - begin)

    @property
    def steady(self) -> float:
        """The sum of the workers' own rates, each to its own last commit: without what the last one runs alone."""
        rate = 0.0
        for process, spans in self.busy.items():
            times = [commit["time"] for commit in self.commits if commit["process"] == process]
            if len(times) > WARM:  # one that came late may have had nothing left that counts
                rate += self.tokens * (len(times) - WARM) / (times[-1] - self.done(spans, WARM))
        return rate

    @property
    def busy_share(self) -> float:
        """Of the devices' time in the window."""
        (begin, end), spans = self.window, itertools.chain.from_iterable(self.busy.values())
        return sum(max(0.0, min(b, end) - max(a, begin)) for a, b in spans) / (end - begin) / self.workers

    @property
    def smi_share(self) -> float:
        """The same by nvidia-smi, of the workers' devices; nan without it."""
        (begin, end), gpus = self.window, {commit["gpu"] for commit in self.commits}
        found = [share for when, gpu, share in self.smi if begin <= when <= end and gpu in gpus]
        return statistics.mean(found) if found else float("nan")

    def figures(self, rows: int) -> dict[str, float]:
        """For the table; ``rows`` samples a shard."""
        decode = statistics.median(d["seconds"] for d in self.decodes) / rows
        return {
            "tokens/s": self.rate,
            "steady tokens/s": self.steady,
            "device busy": self.busy_share,
            "nvidia-smi": self.smi_share,
            "decode ms a sample": 1000 * decode,
            "pixels MB a sample": statistics.median(d["bytes"] for d in self.decodes) / rows / 1e6,
            "write s a shard": statistics.median(w["seconds"] for w in self.writes),
            "MB on disk": self.disk / 1e6,
        }


def through(job: CacheJob, count: int, tokens: int) -> Seen:
    """Runs the stage in the session that is running: ``count`` shards a worker, all alike, after the warm ones.

    A shard has so many ``tokens``. Leaves nothing on disk.
    """
    todo = list(range(job.place.workers * (count + WARM)))
    folder = Path(job.store.url, str(job.targets))
    with _watched(), _smi() as readings:
        for _ in jobs.cache.committed(job, job.place, todo):
            pass
    busy: dict[str, list[Span]] = {}
    for note in notes(job, "busy"):
        busy.setdefault(note["process"], []).extend((begin, end) for begin, end in note["spans"])
    seen = Seen(
        job.place.workers,
        tokens,
        sorted(notes(job, "commit"), key=lambda commit: float(commit["time"])),
        notes(job, "decode"),
        notes(job, "write"),
        busy,
        readings,
        sum(file.stat().st_size for file in folder.glob("shard-*")),
    )
    assert len(seen.commits) == len(todo), f"{len(seen.commits)} commits of {len(todo)} shards"
    shutil.rmtree(folder)
    shutil.rmtree(Path(job.store.url, NOTES))
    return seen


@contextmanager
def _watched() -> Iterator[None]:
    """The stage with the functions that note what they do."""
    usual = jobs.cache.TeacherActor, jobs.cache.decode_shard
    jobs.cache.TeacherActor, jobs.cache.decode_shard = WatchedTeacher, watched_decode  # type: ignore[misc]
    try:
        yield
    finally:
        jobs.cache.TeacherActor, jobs.cache.decode_shard = usual  # type: ignore[misc]


@contextmanager
def _smi() -> Iterator[list[Reading]]:
    """Readings of nvidia-smi while open, of all its devices; none where there is no such program."""
    readings: list[Reading] = []
    if not shutil.which("nvidia-smi"):
        yield readings
        return
    query = ["nvidia-smi", "--query-gpu=uuid,utilization.gpu", "--format=csv,noheader,nounits", f"-lms={SAMPLING}"]
    # by the line, or readings would come by the page
    with subprocess.Popen(["stdbuf", "-oL", *query], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = process.stdout

        def read() -> None:
            for line in lines:
                gpu, _, percent = line.partition(",")
                if percent.strip().isdigit():
                    readings.append((time.time(), gpu.removeprefix("GPU-"), float(percent) / 100))

        thread = Thread(target=read)
        thread.start()
        try:
            yield readings
        finally:
            process.terminate()
            thread.join()
