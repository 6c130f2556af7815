"""What the journal costs: ``python -m tests.bench.journal``; an entry, a whole stage's summary, and a look at it."""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline import journal
from pipeline.journal import Attempts, begin
from pipeline.observe import observe
from pipeline.store import Store
from schemas.artifacts import ArtifactRef
from schemas.manifest import shard_name
from tests.bench.result import Result, add_json, command, print_table
from tests.servers import KEY, SECRET, rclone

REF = ArtifactRef("prepare", "bench", 1)
SHARDS = 1000


def measure(store: Store, shards: int) -> dict[str, float]:
    """The figures of one store."""
    own = begin(store, REF, None)
    own.note("todo", shards=shards)
    worker, entries, commits = Attempts(own, 3, 1), [], []
    for index in range(shards):
        times = [time.perf_counter()]
        worker.begin(index)
        times.append(time.perf_counter())
        store.write(f"{REF}/{shard_name(index)}", b"x" * 100_000)
        times.append(time.perf_counter())
        entries.append(times[1] - times[0])
        commits.append(times[2] - times[1])
    started = time.perf_counter()
    observe(store, REF)
    looked = time.perf_counter()
    journal.history(store, REF, own)
    summed = time.perf_counter()
    journal.clear(store, REF)
    cleared = time.perf_counter()
    return {
        "entry ms": 1e3 * statistics.median(entries),
        "entry ms, 99 %": 1e3 * sorted(entries)[-max(1, shards // 100)],
        "commit of 100 kB ms": 1e3 * statistics.median(commits),
        "look s": looked - started,
        "summary s": summed - looked,
        "removal s": cleared - summed,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Local disk, then S3 by rclone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=SHARDS)
    parser.add_argument("--local", action="store_true", help="the disk alone")
    add_json(parser)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        sides = {"disk": measure(Store(f"{folder}/store"), given.shards)}
        if not given.local:
            sides["S3"] = on_s3(folder, given.shards)
    print_table(sides)
    ratios = {f"{name}: entry / commit": f["entry ms"] / f["commit of 100 kB ms"] for name, f in sides.items()}
    Result("journal", command("journal", arguments), sides, ratios).write(given.json)


def on_s3(folder: str, shards: int) -> dict[str, float]:
    """The figures of a server on this machine."""
    Path(folder, "s3", "bucket").mkdir(parents=True)
    with rclone(Path(folder, "s3")) as endpoint:
        os.environ |= {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        os.environ["AWS_REQUEST_CHECKSUM_CALCULATION"] = "WHEN_REQUIRED"
        return measure(Store("s3://bucket/store"), shards)


if __name__ == "__main__":
    main()
