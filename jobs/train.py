"""What one worker of stage ``distill`` does, of Ray Train or this process: builds the student and trains it."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from jobs.sources import sources_of
from jobs.stages import layer_plan, store_of, teacher_digests, teacher_of
from pipeline.data.processors import load_processor
from pipeline.journal import Journal
from pipeline.models import decoder, head, pick_device
from pipeline.ops.backends import resolve
from pipeline.store import Store
from pipeline.student import apply_start, build_student, record_of, trained_bytes
from pipeline.surgery import widen_trained
from pipeline.training.batches import CachedBatches
from pipeline.training.checkpoint import Saving, best_checkpoint
from pipeline.training.engine import Worker
from pipeline.training.loop import Leaves, Report, Training, stays
from pipeline.training.recompute import TeacherLayers
from pipeline.training.sources import Source
from pipeline.vision import feed_features
from schemas.config import RunConfig, StoreConfig, TeacherConfig
from schemas.layers import LayerPlan

# The trained parameters, the same before the first step, and who computed the mixers.
WEIGHTS, INITIAL, BACKEND = "student.safetensors", "initial.safetensors", "backend.json"
# Seconds between two questions whether a node goes: clouds give notice of half a minute or more.
ASK_SECONDS = 2.0


@dataclass(frozen=True)
class TrainJob:
    """What the workers of one distill stage need; plain values, so that it travels."""

    run: RunConfig
    store: StoreConfig
    teacher: TeacherConfig
    plan: LayerPlan
    sources: tuple[Source, ...]
    digests: dict[str, str]
    fingerprint: str
    command: str | None = None

    def backend(self, store: Store) -> str:
        """Who computed the mixers of the finished training."""
        found: str = json.loads(store.read(f"{self.run.ref('distill')}/{BACKEND}"))
        return found


def train_job(run: RunConfig, fingerprint: str, command: str | None = None) -> TrainJob:
    """What the workers of this run's training need; ``command`` is where in the journal they note what they do."""
    digests, sources = teacher_digests(run.teacher), sources_of(run)
    return TrainJob(run, store_of(run), teacher_of(run), layer_plan(run), sources, digests, fingerprint, command)


def needs_taps(run: RunConfig) -> bool:
    """Whether any phase reads taps."""
    return any(p.kind != "distill" or p.weights.layer > 0 for p in run.distill.phases)


def needs_attention(run: RunConfig) -> bool:
    """Whether training runs the replaced attention, for outputs or mixing matrices that are not in the cache."""
    stored = run.cache.taps.targets == "stored"
    return any(p.kind == "match" for p in run.distill.phases) or (needs_taps(run) and not stored)


def train_here(job: TrainJob, tell: Callable[[dict[str, Any] | str], None]) -> None:
    """Trains in this process, as the only worker; ``tell`` gets the log's entries and what is said."""
    Journal(Store(job.store), job.run.ref("distill"), job.command).note("worker")
    torch.set_num_threads(max(1, round(job.run.placement.distill.cpus_per_worker)))
    device = pick_device(job.run.placement.device)
    train_student(job, Worker(0, 1, device), tell, tell)


def train_worker(config: dict[str, Any]) -> None:
    """The train loop of one Ray Train worker."""
    import ray.train

    job: TrainJob = config["job"]
    Journal(Store(job.store), job.run.ref("distill"), job.command).note("worker")
    mailbox = config["mailbox"]
    context = ray.train.get_context()
    torch.set_num_threads(max(1, round(job.run.placement.distill.cpus_per_worker)))
    device = pick_device(job.run.placement.device)
    if device.type == "cuda":
        device = torch.device("cuda", context.get_local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
    worker = Worker(context.get_world_rank(), context.get_world_size(), device)

    def report(entry: dict[str, Any] | str) -> None:
        # not `ray.train.report`: it waits for the controller's next poll, seconds that a logged step does not have
        if worker.rank == 0:
            mailbox.put_nowait(entry)

    train_student(job, worker, report, report, departure())


class Departure:
    """Tells the workers of a group, all at the same step, that one of their nodes is about to be taken away.

    They ask Ray every few seconds; after how many steps again, rank 0 says.
    """

    def __init__(self) -> None:
        self.steps, self.next, self.asked = 0, 1, time.monotonic()

    def __call__(self) -> bool:
        """To be asked after every step."""
        import ray.train
        from ray.train.collective import broadcast_from_rank_zero

        self.steps += 1
        if self.steps < self.next:
            return False
        now = time.monotonic()
        again = max(1, round(self.steps * ASK_SECONDS / (now - self.asked)))
        self.steps, self.next, self.asked = 0, broadcast_from_rank_zero(again), now
        return ray.train.get_preemption_info() is not None


def departure() -> Leaves:
    """What a worker asks, in a session where nodes can go; elsewhere nobody does."""
    return stays if os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") == "0" else Departure()


def train_student(
    job: TrainJob, worker: Worker, report: Report, say: Callable[[str], None] = print, leaves: Leaves = stays
) -> None:
    """Builds the student and trains it to the end; rank 0 leaves weights and log in the artifact's folder.

    Where ``leaves`` says so, it ends after a checkpoint and leaves nothing else.
    """
    run, place = job.run, job.run.placement.distill
    store, ref = Store(job.store), run.ref("distill")
    ops = resolve(run.placement.backend, worker.device)
    say(f"the mixers are computed by {ops.backend} ({ops.why})")
    replaced: dict[int, torch.nn.Module] = {}
    dtype, cpu = getattr(torch, run.distill.dtype), torch.device("cpu")
    model = build_student(
        job.teacher, job.plan, run.student.init, run.distill.seed, dtype, cpu, ops, job.digests, replaced
    )
    widen_trained(model, run.student.train)
    started = frozenset[int]()
    if earlier := run.earlier():
        name = f"{earlier}/{WEIGHTS}"
        started = apply_start(model, store.read(name), name)
    if run.cache.vision != "none":
        feed_features(model)
    batches = CachedBatches(
        store,
        run.ref("prepare"),
        job.sources,
        job.plan.replaced if needs_taps(run) else (),
        load_processor(job.teacher),
        head(model).out_features,
        micro_batch=place.micro_batch,
        padding=place.padding,
        readers=place.readers,
        held_out=run.distill.validation.fraction,
    )
    training = Training(
        model,
        batches,
        run.distill,
        place,
        run.student,
        worker,
        saving := Saving(store, ref, job.fingerprint, run.distill.keep),
        TeacherLayers(replaced, decoder(model)) if needs_attention(run) else None,
        started,
    )
    if training.run(report, leaves) and worker.rank == 0:
        record, parts = record_of(model), run.student.train
        best = run.distill.result == "best"
        final = best_checkpoint(saving) if best else training.final
        store.write(f"{ref}/{INITIAL}", trained_bytes(training.initial, record, parts))
        store.write(f"{ref}/{WEIGHTS}", trained_bytes(final, record, parts))
        store.write(f"{ref}/{BACKEND}", json.dumps(ops.backend).encode())
