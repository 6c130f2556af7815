"""Measures a small cache, made by the very workers that ``cache`` would use, in a folder that is thrown away."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from cluster.placement import check_fits
from cluster.session import session
from jobs.cache import DECODE_CPUS, CacheJob, cache_job, committed
from pipeline.data.encoding import EncodedSample
from pipeline.data.samples import sample_columns
from pipeline.shards import fold_manifest, read_shard, shard_bytes, write_shard
from pipeline.store import Store
from schemas.config import RunConfig, StoreConfig
from schemas.errors import ConfigInvalid
from schemas.manifest import Manifest
from schemas.tables import SAMPLES, targets_table

# Shards a worker: its first warms it up, and the others give the rate.
SHARDS_A_WORKER = 4
FINGERPRINT = "0" * 32


@dataclass(frozen=True)
class Measured:
    """What the workers did with ``samples`` samples.

    ``samples_per_second`` is of all workers once they run, ``overhead_seconds`` everything else: starting Ray,
    importing, loading the teacher, ending. ``target_bytes`` are those of one shard with all the rows, without taps and
    vision features.
    """

    samples: int
    samples_per_second: float
    overhead_seconds: float
    target_bytes: int

    def seconds(self, samples: int) -> float:
        """How long ``cache`` would take for so many samples on the same machine."""
        return self.overhead_seconds + samples / self.samples_per_second


def probe(run: RunConfig, samples: Sequence[EncodedSample]) -> Measured:
    """Caches the samples as the run would, and measures.

    Raises:
        ConfigInvalid: the placement does not fit this machine, or the samples are too few.
    """
    place = run.placement.cache
    if len(samples) < 2 * place.workers:
        raise ConfigInvalid(
            f"--probe: {len(samples)} samples are too few for {place.workers} workers to show their rate; "
            f"give at least {2 * place.workers}, or 0 for no probe"
        )
    with TemporaryDirectory(prefix="decant-probe-") as folder:
        store = Store(folder)
        job = replace(cache_job(run, FINGERPRINT), store=StoreConfig(url=folder))
        shards = _write_samples(store, job, samples, SHARDS_A_WORKER * place.workers)
        started = time.monotonic()
        with session():
            check_fits(run.placement, "cache", spare_cpus=DECODE_CPUS)
            assert sum(committed(job, place, list(range(shards)))) == len(samples)
        manifest = fold_manifest(store, job.targets, targets_table(job.config, job.tapped), shards, FINGERPRINT)
        seconds = time.monotonic() - started
        rate = _rate(Path(folder) / str(job.targets), manifest, place.workers)
        size = _target_bytes(store, job, manifest)
    return Measured(len(samples), rate, seconds - len(samples) / rate, size)


def _write_samples(store: Store, job: CacheJob, samples: Sequence[EncodedSample], shards: int) -> int:
    """Writes the samples as so many shards at most, of about equal rows; returns their number."""
    shards = min(shards, len(samples))
    for index in range(shards):
        rows = samples[index * len(samples) // shards : (index + 1) * len(samples) // shards]
        write_shard(store, job.samples, SAMPLES, index, sample_columns(rows), FINGERPRINT)
    fold_manifest(store, job.samples, SAMPLES, shards, FINGERPRINT)
    return shards


def _rate(folder: Path, manifest: Manifest, workers: int) -> float:
    """Samples a second from the moment when every worker may have committed its first shard.

    By the files' own times: on a busy machine the driver hears of a commit seconds later.
    """
    commits = sorted(((folder / s.name).stat().st_mtime, s.rows) for s in manifest.shards)
    return sum(rows for _, rows in commits[workers:]) / (commits[-1][0] - commits[workers - 1][0])


def _target_bytes(store: Store, job: CacheJob, manifest: Manifest) -> int:
    """What the targets of all shards take in one: small shards compress worse."""
    full = targets_table(job.config, job.tapped)
    table = targets_table(job.config.model_copy(update={"vision": "none"}), ())
    columns: dict[str, list[object]] = {c.name: [] for c in table.columns}
    for info in manifest.shards:
        data = read_shard(store, job.targets, full, info, list(columns))
        for name in columns:
            columns[name] += data[name].to_pylist()
    return len(shard_bytes(table, 0, columns, FINGERPRINT))
