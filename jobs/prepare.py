"""Stage ``prepare``: conversations to the ``samples`` table, one committed shard a call of a worker.

The data file is looked through once for where its records lie; workers (Ray Data) then read, encode and commit parts,
with the teacher's answers where those are wanted. A rerun does what is missing in the store.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from cluster.datasets import shard_dataset
from cluster.placement import check_fits, worker_options
from cluster.session import session
from jobs.progress import Progress
from jobs.stages import reading, resolved, store_of, teacher_digests, teacher_of
from pipeline.answers import Answerer
from pipeline.data.encoding import Encoder
from pipeline.data.processors import load_processor
from pipeline.data.records import Part, data_digest, parts
from pipeline.data.samples import Answers, finish, prepare_shard
from pipeline.folders import processor_digests
from pipeline.hub import folder_of
from pipeline.journal import Attempts, Journal
from pipeline.shards import uncommitted
from pipeline.stage import Stage
from pipeline.store import Store
from schemas.artifacts import ArtifactRef
from schemas.config import PrepareConfig, RunConfig, StoreConfig, TeacherConfig
from schemas.errors import SampleInvalid
from schemas.placement import Placement, PreparePlacement
from schemas.sections import Device
from schemas.tables import SAMPLES


@dataclass(frozen=True)
class PrepareJob:
    """What the workers of one prepare stage need; plain values, so that it travels."""

    store: StoreConfig
    samples: ArtifactRef
    teacher: TeacherConfig
    config: PrepareConfig
    fingerprint: str
    device: Device
    place: PreparePlacement
    command: str | None


def stage(run: RunConfig) -> Stage:
    """The stage of this run. Identity: data file, the teacher's processor, sharding, maximum length, table."""
    config = run.prepare
    encoder = Encoder(load_processor(run.teacher), config.max_length, config.template)
    settings = {
        "data": data_digest(config.data),
        "processor": {**processor_digests(folder_of(run.teacher)), **reading(run.teacher)},
        **_unusual(config),
        "shard_rows": config.shard_rows,
        "max_length": config.max_length,
        "on_bad_sample": config.on_bad_sample,
        "table": str(SAMPLES),
        **({"teacher": teacher_digests(run.teacher)} if config.answers else {}),
    }

    def work(store: Store, fingerprint: str, journal: Journal) -> dict[str, Any]:
        job = PrepareJob(
            store=store_of(run),
            samples=run.ref("prepare"),
            teacher=teacher_of(run),
            config=config,
            fingerprint=fingerprint,
            device=run.placement.device,
            place=run.placement.prepare,
            command=journal.command,
        )
        try:
            count = _prepare(store, job, run.placement, journal)
            counts = finish(store, job.samples, config, count, fingerprint)
            return {**counts, "end_token": encoder.renderer.has_end()}
        except SampleInvalid:
            # the user will mend the data, which is then other data: what was begun from the old is of no use
            store.remove(str(job.samples))
            raise

    return Stage(run.ref("prepare"), (), settings, work, resolved(run))


def _unusual(config: PrepareConfig) -> dict[str, Any]:
    """Settings that are part of the identity where they are not the default."""
    return config.model_dump(mode="json", include={"template", "answers", "truncated_images"}, exclude_defaults=True)


def _prepare(store: Store, job: PrepareJob, placement: Placement, journal: Journal) -> int:
    """Commits what is missing; returns the number of shards that there are then."""
    found = parts(job.config.data, job.config.shard_rows)
    todo = {i: found[i] for i in uncommitted(store, job.samples, len(found))}
    journal.note("todo", shards=len(found))
    done = 0
    with Progress("prepare", sum(part.count for part in todo.values()), "records") as progress:
        for records in (_on_workers if job.place.workers else _here)(job, todo, placement):
            done += records
            progress.update(done)
    return len(found)


def _here(job: PrepareJob, todo: dict[int, Part], _: Placement) -> Iterator[int]:
    worker = PrepareWorker(job) if todo else None
    for index, part in todo.items():
        assert worker is not None
        yield worker.commit(index, part)


def _on_workers(job: PrepareJob, todo: dict[int, Part], placement: Placement) -> Iterator[int]:
    if not todo:
        return
    with session():
        from ray.data import ActorPoolStrategy

        check_fits(placement, "prepare")
        place = placement.prepare
        dataset = shard_dataset([{"shard": i, **asdict(part)} for i, part in todo.items()]).map_batches(
            PrepareWorker,
            fn_constructor_args=(job,),
            batch_size=1,
            batch_format="pyarrow",
            **worker_options(place),
            compute=ActorPoolStrategy(size=min(place.workers, len(todo))),
        )
        yield from (row["records"] for row in dataset.iter_rows())


class PrepareWorker:
    """Reads, encodes and commits parts of the data file; with a teacher's answers where they are wanted."""

    def __init__(self, job: PrepareJob) -> None:
        self.job, self.store, config = job, Store(job.store), job.config
        self.attempts = Attempts(Journal(self.store, job.samples, job.command), job.place.retries, job.place.workers)
        self.encoder = Encoder(load_processor(job.teacher), config.max_length, config.template)
        self.answer: Answers | None = None
        if config.answers:
            self.answer = Answerer(job.teacher, config.answers, self.encoder, job.device, job.place.batch).answer

    def __call__(self, row: pa.Table) -> pa.Table:
        """Commits the row's shard; returns its number of records."""
        (given,) = row.to_pylist()
        return pa.table({"records": [self.commit(given.pop("shard"), Part(**given))]})

    def commit(self, index: int, part: Part) -> int:
        """Commits a shard; returns its number of records."""
        job = self.job
        self.attempts.begin(index)
        return prepare_shard(
            self.store, job.samples, job.config, self.encoder, part, index, job.fingerprint, self.answer
        )
