"""Stage ``distill``: Ray Train workers train the student from the cache alone; no teacher forward runs.

The train loop is importable and knows its data by arithmetic; Ray gives the worker group, its restarts and the process
group. Checkpoints go to the artifact's folder, so that any rerun continues from them.
"""

import json
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cluster.placement import check_fits
from cluster.session import session
from jobs.progress import Progress
from jobs.stages import layer_plan, resolved, store_of, tapped_layers, teacher_digests, teacher_path
from pipeline.models import decoder, load_processor, pick_device
from pipeline.ops.backends import resolve
from pipeline.stage import Stage
from pipeline.store import Store
from pipeline.student import build_student, check_plan, record_of, trained_bytes
from pipeline.training.batches import CachedBatches
from pipeline.training.loop import Report, Saving, Training, Worker
from pipeline.training.recompute import TeacherLayers
from schemas.config import RunConfig, StoreConfig
from schemas.errors import ConfigInvalid
from schemas.layers import LayerPlan

# The trained parameters, and the same before the first step.
WEIGHTS, INITIAL, CURVE = "student.safetensors", "initial.safetensors", "curve.json"
# A worker that dies is started again this often before the stage gives up.
MAX_FAILURES = 3


@dataclass(frozen=True)
class DistillJob:
    """What the workers of one distill stage need; plain values, so that it travels."""

    run: RunConfig
    store: StoreConfig
    teacher: str
    plan: LayerPlan
    tapped: tuple[int, ...]
    digests: dict[str, str]
    fingerprint: str


def stage(run: RunConfig) -> Stage:
    """The stage of this run. Identity: recipe, layers, initialisation, and what the inputs were made from.

    Raises:
        ConfigInvalid: the recipe needs taps of layers that the cache does not hold.
    """
    config, plan, tapped = run.distill, layer_plan(run), tapped_layers(run)
    check_plan(teacher_path(run), plan)
    lacking = sorted(set(plan.replaced) - set(tapped))
    if needs_taps(run) and lacking:
        raise ConfigInvalid(
            f"cache.taps: the recipe has a layer loss, but the cache holds no taps of layers {lacking}; "
            "set cache.taps.fraction above 0 and cache.taps.layers to `replaced`, or the layer weights to 0"
        )
    for number, phase in enumerate(config.phases):
        if phase.batch < run.placement.distill.workers:
            raise ConfigInvalid(
                f"distill.phases.{number}.batch: {phase.batch} is less than placement.distill.workers "
                f"({run.placement.distill.workers}); every worker needs a row"
            )
    settings = {
        **config.model_dump(mode="json", exclude={"artifact", "checkpoint_every"}),
        "student": {
            "layers": plan.total,
            "replaced": plan.replaced,
            "init": run.student.init,
            "train": run.student.train,
        },
        "teacher": teacher_digests(run.teacher.path),
    }

    def work(store: Store, fingerprint: str) -> dict[str, Any]:
        return _distill(store, distill_job(run, fingerprint))

    return Stage(run.ref("distill"), (run.ref("prepare"), run.ref("cache")), settings, work, resolved(run))


def needs_taps(run: RunConfig) -> bool:
    """Whether any phase has a layer loss."""
    return any(p.kind == "align" or p.weights.layer > 0 for p in run.distill.phases)


def distill_job(run: RunConfig, fingerprint: str) -> DistillJob:
    """What the workers of this run's training need."""
    digests = teacher_digests(run.teacher.path)
    return DistillJob(run, store_of(run), teacher_path(run), layer_plan(run), tapped_layers(run), digests, fingerprint)


def _distill(store: Store, job: DistillJob) -> dict[str, Any]:
    ref = job.run.ref("distill")
    with session():
        check_fits("distill", job.run.placement.distill)
        _fit(job)
    curve = json.loads(store.read(f"{ref}/{CURVE}"))
    return {
        "replaced": list(job.plan.replaced),
        "steps": sum(p.steps for p in job.run.distill.phases),
        "workers": job.run.placement.distill.workers,
        "backend": curve["backend"],
        "last": curve["history"][-1],
    }


def _fit(job: DistillJob) -> None:
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as TrainRun
    from ray.train.torch import TorchTrainer
    from ray.util.queue import Queue

    place = job.run.placement.distill
    mailbox = Queue(actor_options={"num_cpus": 0})
    with tempfile.TemporaryDirectory(prefix="decant-") as scratch:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"job": job, "mailbox": mailbox},
            scaling_config=ScalingConfig(
                num_workers=place.workers,
                use_gpu=place.gpus_per_worker > 0,
                accelerator_type=place.accelerator_type,
                resources_per_worker={
                    "CPU": place.cpus_per_worker,
                    **({"GPU": place.gpus_per_worker} if place.gpus_per_worker else {}),
                },
            ),
            # Ray's own run folder holds nothing of ours: position and weights are in the artifact
            run_config=TrainRun(
                name="distill", storage_path=scratch, failure_config=FailureConfig(max_failures=MAX_FAILURES)
            ),
        )
        viewer = threading.Thread(target=_show, args=(mailbox, job), daemon=True)
        viewer.start()
        try:
            trainer.fit()
        finally:
            mailbox.put(None)
            viewer.join(timeout=10)
            mailbox.shutdown(force=True)


def _show(mailbox: Any, job: DistillJob) -> None:
    """Shows what rank 0 says and reports until the closing None."""
    phases = job.run.distill.phases
    before = [sum(p.steps for p in phases[:i]) for i in range(len(phases))]
    with Progress("distill", sum(p.steps for p in phases), "steps") as progress:
        while (entry := mailbox.get()) is not None:
            if isinstance(entry, str):
                progress.say(entry)
                continue
            shown = ("kl", "ce") if entry["kind"] == "distill" else ("loss",)
            note = " ".join(f"{k} {entry[k]:.4f}" for k in shown if k in entry)
            progress.update(before[entry["phase"]] + entry["step"], f"{entry['kind']} {note}")


def train_worker(config: dict[str, Any]) -> None:
    """The train loop of one Ray Train worker."""
    import ray.train

    job: DistillJob = config["job"]
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

    train_student(job, worker, report, report)


def train_student(job: DistillJob, worker: Worker, report: Report, say: Callable[[str], None] = print) -> None:
    """Builds the student and trains it to the end; rank 0 leaves weights and curve in the artifact's folder."""
    run = job.run
    store, ref = Store(job.store), run.ref("distill")
    dtype = getattr(torch, run.distill.dtype)
    ops = resolve(run.placement.backend, worker.device)
    replaced: dict[int, torch.nn.Module] = {}
    say(f"the mixers are computed by {ops.backend} ({ops.why})")
    model = build_student(
        job.teacher, job.plan, run.student.init, run.distill.seed, dtype, worker.device, ops, job.digests, replaced
    )
    batches = CachedBatches(
        store,
        run.ref("prepare"),
        run.ref("cache"),
        run.cache,
        job.tapped,
        job.plan.replaced if needs_taps(run) else (),
        load_processor(job.teacher),
    )
    training = Training(
        model,
        batches,
        run.distill,
        run.cache.targets.temperature,
        run.student,
        worker,
        Saving(store, ref, job.fingerprint),
        TeacherLayers(replaced, decoder(model)) if run.cache.taps.targets == "recompute" else None,
    )
    state = training.run(report)
    if worker.rank == 0:
        record, parts = record_of(model), run.student.train
        store.write(f"{ref}/{INITIAL}", trained_bytes(training.initial, record, parts))
        store.write(f"{ref}/{WEIGHTS}", trained_bytes(training.trained(), record, parts))
        curve = {"backend": ops.backend, "history": state.history}
        store.write(f"{ref}/{CURVE}", (json.dumps(curve, indent=0) + "\n").encode())
