"""What the journal costs: ``python -m tests.bench.journal``; an entry, a whole stage's summary, and a look at it."""

import os
import statistics
import tempfile
import time
from pathlib import Path

from pipeline import journal
from pipeline.journal import Attempts, begin
from pipeline.observe import observe
from pipeline.store import Store
from schemas.artifacts import ArtifactRef
from schemas.manifest import shard_name
from tests.servers import KEY, SECRET, rclone

REF = ArtifactRef("prepare", "bench", 1)
SHARDS = 1000


def measure(store: Store) -> None:
    """Prints the figures of one store."""
    own = begin(store, REF, None)
    own.note("todo", shards=SHARDS)
    worker, entries, commits = Attempts(own, 3, 1), [], []
    for index in range(SHARDS):
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
    print(
        f"{store.url}: an entry {1e3 * statistics.median(entries):.2f} ms "
        f"(99 %: {1e3 * sorted(entries)[-SHARDS // 100]:.2f} ms), the commit of 100 kB "
        f"{1e3 * statistics.median(commits):.2f} ms; of {SHARDS} shards: a look {looked - started:.2f} s, "
        f"the summary {summed - looked:.2f} s, its removal {cleared - summed:.2f} s"
    )


def main() -> None:
    """Local disk, then S3 by rclone."""
    with tempfile.TemporaryDirectory() as folder:
        measure(Store(f"{folder}/store"))
        Path(folder, "s3", "bucket").mkdir(parents=True)
        with rclone(Path(folder, "s3")) as endpoint:
            os.environ |= {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
            os.environ["AWS_REQUEST_CHECKSUM_CALCULATION"] = "WHEN_REQUIRED"
            measure(Store("s3://bucket/store"))


if __name__ == "__main__":
    main()
