"""Stage ``prepare``: conversations in the LLaVA format to the ``samples`` table, one committed shard a task.

The data file is looked through once for where its records lie; workers (Ray Data) then read, encode and commit a part
each. A rerun does what is missing in the store.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa

from cluster.datasets import shard_dataset
from cluster.placement import check_fits
from cluster.session import session
from jobs.progress import Progress
from jobs.stages import absolute, file_digest, resolved, store_of, teacher_path
from pipeline.data.encoding import Encoder
from pipeline.data.records import Part, parts
from pipeline.data.samples import finish, prepare_shard
from pipeline.folders import processor_digests
from pipeline.models import load_processor
from pipeline.shards import uncommitted
from pipeline.stage import Stage
from pipeline.store import Store
from schemas.artifacts import ArtifactRef
from schemas.config import PrepareConfig, RunConfig, StoreConfig
from schemas.errors import SampleInvalid
from schemas.placement import PreparePlacement
from schemas.tables import SAMPLES


@dataclass(frozen=True)
class PrepareJob:
    """What the workers of one prepare stage need; plain values, so that it travels."""

    store: StoreConfig
    samples: ArtifactRef
    teacher: str
    config: PrepareConfig
    fingerprint: str


def stage(run: RunConfig) -> Stage:
    """The stage of this run. Identity: data file, the teacher's processor, sharding, maximum length, table."""
    config = run.prepare
    settings = {
        "data": file_digest(config.data),
        "processor": processor_digests(run.teacher.path),
        "shard_rows": config.shard_rows,
        "max_length": config.max_length,
        "on_bad_sample": config.on_bad_sample,
        "table": str(SAMPLES),
    }

    def work(store: Store, fingerprint: str) -> dict[str, Any]:
        where = {"data": absolute(config.data), "images": absolute(config.images)}
        job = PrepareJob(
            store_of(run), run.ref("prepare"), teacher_path(run), config.model_copy(update=where), fingerprint
        )
        try:
            count = _prepare(store, job, run.placement.prepare)
            return finish(store, job.samples, config, count, fingerprint)
        except SampleInvalid:
            # the user will mend the data, which is then other data: what was begun from the old is of no use
            store.remove(str(job.samples))
            raise

    return Stage(run.ref("prepare"), (), settings, work, resolved(run))


def _prepare(store: Store, job: PrepareJob, place: PreparePlacement) -> int:
    """Commits what is missing; returns the number of shards that there are then."""
    found = parts(job.config.data, job.config.shard_rows)
    todo = {i: found[i] for i in uncommitted(store, job.samples, len(found))}
    done = 0
    with Progress("prepare", sum(part.count for part in todo.values()), "records") as progress:
        for records in (_on_workers if place.workers else _here)(job, todo, place):
            done += records
            progress.update(done)
    return len(found)


def _here(job: PrepareJob, todo: dict[int, Part], _: PreparePlacement) -> Iterator[int]:
    for index, part in todo.items():
        yield _shard(job, index, part)


def _on_workers(job: PrepareJob, todo: dict[int, Part], place: PreparePlacement) -> Iterator[int]:
    if not todo:
        return
    with session():
        from ray.data import TaskPoolStrategy

        check_fits("prepare", place)
        dataset = shard_dataset([{"shard": i, **asdict(part)} for i, part in todo.items()]).map_batches(
            prepare_row,
            fn_args=(job,),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=place.cpus_per_worker,
            compute=TaskPoolStrategy(size=min(place.workers, len(todo))),
        )
        yield from (row["records"] for row in dataset.iter_rows())


def prepare_row(row: pa.Table, job: PrepareJob) -> pa.Table:
    """Commits the row's shard; returns its number of records."""
    (given,) = row.to_pylist()
    return pa.table({"records": [_shard(job, given.pop("shard"), Part(**given))]})


def _shard(job: PrepareJob, index: int, part: Part) -> int:
    encoder = _encoder(job.teacher, job.config.max_length)
    return prepare_shard(Store(job.store), job.samples, job.config, encoder, part, index, job.fingerprint)


@lru_cache(maxsize=1)
def _encoder(teacher: str, max_length: int) -> Encoder:
    return Encoder(load_processor(teacher), max_length)
