"""Stage ``cache``: Ray Data runs the teacher once over all samples and leaves committed ``targets`` shards.

One row of the dataset is one shard: its descriptor goes in, a CPU task adds the decoded images, and one call of a
teacher actor computes and commits it. Nothing is remembered outside the store: a rerun does what is missing there.
"""

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from cluster.datasets import shard_dataset
from cluster.placement import check_fits, selector_of, worker_options
from cluster.session import session
from jobs.progress import Progress
from jobs.stages import (
    layer_plan,
    refuse_image_positions,
    resolved,
    store_of,
    tapped_layers,
    teacher_digests,
    teacher_of,
)
from pipeline.capture import PreparedSample, Teacher
from pipeline.data.collate import Features, image_features
from pipeline.data.encoding import EncodedSample
from pipeline.data.processors import Processor, load_processor
from pipeline.data.samples import decode_samples
from pipeline.folders import other_vocabulary
from pipeline.journal import Attempts, Journal
from pipeline.shards import column_bytes, fold_manifest, read_manifest, read_shard, uncommitted, write_shard
from pipeline.spread import refuse_split
from pipeline.stage import Stage, require
from pipeline.store import Store
from pipeline.student import check_plan
from pipeline.vision import refuse_other_towers
from schemas.artifacts import ArtifactRef
from schemas.config import CacheConfig, RunConfig, StoreConfig, TeacherConfig
from schemas.errors import ConfigInvalid, WorkersLost
from schemas.manifest import Manifest
from schemas.placement import CachePlacement, Placement
from schemas.sections import Device
from schemas.tables import SAMPLES, VISION, targets_table

if TYPE_CHECKING:
    from ray.data import Dataset

# CPUs of one decoding task; not the teacher's, or Ray would fuse the two operators.
DECODE_CPUS = 0.25
# Calls of one teacher at once: one computes, and two write, because writing many taps takes longer than computing.
CALLS = 3


@dataclass(frozen=True)
class CacheJob:
    """What the workers of one cache stage need; plain values, so that it travels."""

    store: StoreConfig
    samples: ArtifactRef
    targets: ArtifactRef
    teacher: TeacherConfig
    config: CacheConfig
    tapped: tuple[int, ...]
    fingerprint: str
    device: Device
    place: CachePlacement
    threads: int
    command: str | None = None


def stage(run: RunConfig) -> Stage:
    """The stage of this run. Identity: the targets' settings, the tapped layers, the teacher and the table."""
    config, tapped = run.cache, tapped_layers(run)
    check_plan(run.teacher, layer_plan(run))
    refuse_split(run.teacher, run.placement.cache)
    if config.vision != "none":
        refuse_other_towers(run.teacher)
    if config.taps.targets == "recompute":
        refuse_image_positions(run, "cache.taps.targets: `recompute`", "use `stored`")
    settings = {
        "targets": config.targets.model_dump(),
        "positions": config.positions,
        "taps": {"layers": tapped, **config.taps.model_dump(exclude={"layers"})},
        "dtype": config.dtype,
        "seed": config.seed,
        # absent where it is off, so that caches from before it are still these settings'
        **({} if config.vision == "none" else {"vision": config.vision}),
        "teacher": teacher_digests(run.teacher),
        "table": str(targets_table(config, tapped)),
    }

    def work(store: Store, fingerprint: str, journal: Journal) -> dict[str, Any]:
        try:
            check_tokenizer(store, run)
        except ConfigInvalid:
            # what the user changes makes it another cache, which this name is to be free for
            store.remove(str(run.ref("cache")))
            raise
        return _cache(store, cache_job(run, fingerprint, journal.command), run.placement)

    return Stage(run.ref("cache"), (run.ref("prepare"),), settings, work, resolved(run))


def check_tokenizer(store: Store, run: RunConfig) -> None:
    """Checks that ids mean to the teacher what they meant when the samples were made, maybe for another teacher.

    Raises:
        ConfigInvalid: the tokenizer that they were made with is another one; names the files that differ.
    """
    samples = require(store, run.ref("prepare"))
    if files := other_vocabulary(teacher_digests(run.teacher), samples.identity["settings"]["processor"]):
        raise ConfigInvalid(
            f"teacher.path: {run.teacher.path} has another tokenizer than {samples.ref} was made with "
            f"({', '.join(files)} differ); prepare samples for this teacher under another name (prepare.artifact)"
        )


def cache_job(run: RunConfig, fingerprint: str, command: str | None = None) -> CacheJob:
    """What the workers of this run's cache need; ``command`` is where in the journal they note what they do."""
    place = run.placement.cache
    return CacheJob(
        store=store_of(run),
        samples=run.ref("prepare"),
        targets=run.ref("cache"),
        teacher=teacher_of(run),
        config=run.cache,
        tapped=tapped_layers(run),
        fingerprint=fingerprint,
        device=run.placement.device,
        place=place,
        threads=max(1, round(place.cpus_per_worker)),
        command=command,
    )


def _cache(store: Store, job: CacheJob, placement: Placement) -> dict[str, Any]:
    samples = read_manifest(store, job.samples)
    todo = uncommitted(store, job.targets, len(samples.shards))
    Journal(store, job.targets, job.command).note("todo", shards=len(samples.shards))
    if todo:
        with session():
            check_fits(placement, "cache", spare_cpus=DECODE_CPUS)
            done = 0
            with Progress("cache", sum(samples.shards[i].rows for i in todo), "samples") as progress:
                progress.update(done)
                for rows in committed(job, job.place, todo):
                    done += rows
                    progress.update(done)
    table = targets_table(job.config, job.tapped)
    manifest = fold_manifest(store, job.targets, table, len(samples.shards), job.fingerprint)
    sizes = column_bytes(store, job.targets, manifest)
    responses = require(store, job.samples).result["response_tokens"]
    taps = sum(size for name, size in sizes.items() if name.startswith("tap_"))
    vision = sizes.get(VISION, 0)
    targets = sum(sizes.values()) - taps - vision
    return {
        "samples": manifest.rows,
        "shards": len(manifest.shards),
        "computed_shards": len(todo),
        "response_tokens": responses,
        "bytes": sum(s.bytes for s in manifest.shards),
        "target_bytes": targets,
        "tap_bytes": taps,
        **({} if job.config.vision == "none" else {"vision_bytes": vision}),
        "bytes_per_response_token": round(targets / responses, 3),
    }


def committed(job: CacheJob, place: CachePlacement, todo: list[int]) -> Iterator[int]:
    """Has the shards computed in the session that is running; gives the rows of each as it has been committed."""
    from ray.data import ActorPoolStrategy
    from ray.exceptions import NodeDiedError, WorkerCrashedError

    dataset = _decoded(job, place, todo).map_batches(
        TeacherActor,
        fn_constructor_args=(job,),
        batch_size=1,
        batch_format="pyarrow",
        **worker_options(place),
        compute=ActorPoolStrategy(
            size=min(place.workers, len(todo)),
            max_concurrent_calls_per_actor=CALLS,
            enable_true_multi_threading=True,
        ),
    )
    try:
        yield from (row["rows"] for row in dataset.iter_rows())
    except (WorkerCrashedError, NodeDiedError) as error:
        raise WorkersLost(
            f"{job.targets}: a worker that decodes images ended without an error {place.retries + 1} times over one "
            "shard: most likely it was killed for want of memory, or its node was lost. Fewer at once "
            "(placement.cache.decoders) or more memory help; then run the same command again"
        ) from error


def _decoded(job: CacheJob, place: CachePlacement, todo: list[int]) -> "Dataset":
    """One row a shard, with its images decoded; a task that is lost is tried again ``place.retries`` times."""
    from ray.data import TaskPoolStrategy
    from ray.util.annotations import RayDeprecationWarning

    with warnings.catch_warnings():
        # `max_retries` has no other way in yet, and without it there is no end
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return shard_dataset([{"shard": i} for i in todo]).map_batches(
            decode_shard,
            fn_args=(job,),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=DECODE_CPUS,
            **selector_of(place.decoder_labels),
            max_retries=place.retries,
            compute=TaskPoolStrategy(size=place.decoders),
        )


@lru_cache(maxsize=1)
def _processor(teacher: TeacherConfig) -> Processor:
    return load_processor(teacher)


def decode_shard(row: pa.Table, job: CacheJob) -> pa.Table:
    """Adds what the model takes of a shard's images."""
    index = row["shard"][0].as_py()
    samples = _read_samples(job, index)
    return features_row(index, [image_features(_processor(job.teacher), s.images) for s in samples])


def features_row(index: int, features: Sequence[Features]) -> pa.Table:
    """A shard's row with what the model takes of its images: one array an entry, with sample, name, type and shape."""
    entries = [(number, name, array) for number, f in enumerate(features) for name, array in f.items()]
    columns = {
        "sample": pa.array([[number for number, _, _ in entries]], pa.list_(pa.int64())),
        "name": pa.array([[name for _, name, _ in entries]], pa.list_(pa.string())),
        "dtype": pa.array([[array.dtype.str for _, _, array in entries]], pa.list_(pa.string())),
        "dims": pa.array([[array.shape for _, _, array in entries]], pa.list_(pa.list_(pa.int64()))),
        "data": pa.array([[array.tobytes() for _, _, array in entries]], pa.list_(pa.large_binary())),
    }
    return pa.table({"shard": [index], **columns})


def features_of(row: pa.Table, samples: int) -> list[Features]:
    """What ``features_row`` added, by sample; arrays share the row's memory."""
    found: list[Features] = [{} for _ in range(samples)]
    numbers, names, dtypes, dims = (row[c][0].as_py() for c in ("sample", "name", "dtype", "dims"))
    data = row["data"][0].values
    _, ends, values = data.buffers()
    ends = np.frombuffer(ends, np.int64)[data.offset :][: len(data) + 1]
    # by the buffers: Arrow copies each of an array's values that is asked for, with the interpreter's lock held
    for number, name, dtype, shape, start, end in zip(numbers, names, dtypes, dims, ends[:-1], ends[1:], strict=True):
        found[number][name] = np.frombuffer(values[start:end], dtype).reshape(shape)
    return found


def _read_samples(job: CacheJob, index: int) -> list[EncodedSample]:
    store = Store(job.store)
    info = _manifest(job.store, job.samples, job.fingerprint).shards[index]
    return decode_samples(read_shard(store, job.samples, SAMPLES, info))


@lru_cache(maxsize=1)
def _manifest(store: StoreConfig, samples: ArtifactRef, _: str) -> Manifest:
    """The samples' manifest, which thousands of shards make large: read once a process and job."""
    return read_manifest(Store(store), samples)


class TeacherActor:
    """One teacher of the pool: computes and commits the shards that it is handed.

    Several calls run at once: while one has the device, others encode, compress and write what they got from it.
    """

    def __init__(self, job: CacheJob) -> None:
        torch.set_num_threads(job.threads)
        # one thread of its own, because libraries remember what suits a shape (cuDNN's plans) a thread
        self.device = ThreadPoolExecutor(1)
        self.job, self.store = job, Store(job.store)
        # before the teacher, whose loading may be what ends a worker
        self.attempts = Attempts(Journal(self.store, job.targets, job.command), job.place.retries, job.place.workers)
        self.teacher = Teacher(job.teacher, job.config, job.tapped, job.device, job.place)

    def __call__(self, row: pa.Table) -> pa.Table:
        """Commits the row's shard; returns its index and rows."""
        index = row["shard"][0].as_py()
        self.attempts.begin(index)
        samples = _read_samples(self.job, index)
        prepared = list(map(PreparedSample, samples, features_of(row, len(samples))))
        columns = self.teacher.columns(self.device.submit(self.teacher.forward, prepared).result())
        write_shard(self.store, self.job.targets, self.teacher.table, index, columns, self.job.fingerprint)
        return pa.table({"shard": [index], "rows": [len(samples)]})
