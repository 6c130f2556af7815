"""Stage ``distill``: Ray Train workers train the student from the cache alone; no teacher forward runs.

The train loop is importable (``jobs.train``) and knows its data by arithmetic; Ray gives the worker group and the
process group. Checkpoints go to the artifact's folder, so that any rerun continues from them. With no workers at all
the same steps run in this process.
"""

import json
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from cluster.placement import check_fits, here, worker_options
from cluster.session import find_users_error, session
from jobs import cache
from jobs.progress import Progress
from jobs.sources import sources_of
from jobs.stages import layer_plan, refuse_image_positions, resolved, tapped_layers, teacher_digests
from jobs.trackers import check_trackers, open_trackers
from jobs.train import BACKEND, TrainJob, needs_taps, train_here, train_job, train_worker
from pipeline.divergences import refuse_undetermined
from pipeline.journal import Journal
from pipeline.stage import Stage, identify, require
from pipeline.store import Store
from pipeline.student import check_plan
from schemas.artifacts import CHECKPOINTS, LOG
from schemas.canonical import differences
from schemas.config import RunConfig
from schemas.errors import ArtifactDrift, ConfigInvalid, WorkersLost

# Local files of trackers, beside the artifact's own; in the working folder where the store is not local.
TRACKED = "tracking"


def stage(run: RunConfig) -> Stage:
    """The stage of this run. Identity: recipe, layers, initialisation, and what the inputs were made from.

    Raises:
        ConfigInvalid: the recipe needs what the cache does not hold, or the workers cannot share a step.
        DecantError: another teacher's cache does not fit (see ``sources_of``).
    """
    config, plan = run.distill, layer_plan(run)
    check_plan(run.teacher, plan)
    _check_recipe(run)
    _check_placement(run)
    check_trackers(run.placement.distill.trackers)
    # absent where no other teachers are mixed in, so that students from before are still these settings'
    alone = set() if config.teachers else {"teachers", "own_weight"}
    settings = {
        **config.model_dump(mode="json", exclude={"artifact", "checkpoint_every", "keep"} | alone),
        "student": {
            "layers": plan.total,
            "replaced": plan.replaced,
            **run.student.model_dump(mode="json", exclude={"layers"}),
        },
        "teacher": teacher_digests(run.teacher),
    }
    earlier = run.earlier()
    caches = (source.ref for source in sources_of(run))
    inputs = (run.ref("prepare"), *caches, *((earlier,) if earlier else ()))

    def work(store: Store, fingerprint: str, journal: Journal) -> dict[str, Any]:
        check_cache(store, run)
        return _distill(store, train_job(run, fingerprint, journal.command))

    return Stage(run.ref("distill"), inputs, settings, work, resolved(run))


def _check_recipe(run: RunConfig) -> None:
    config = run.distill
    refuse_undetermined(run.cache.targets.kind, config.divergence)
    lacking = sorted(set(layer_plan(run).replaced) - set(tapped_layers(run)))
    if needs_taps(run) and lacking:
        raise ConfigInvalid(
            f"cache.taps: the recipe has a layer loss, but the cache holds no taps of layers {lacking}; "
            "set cache.taps.fraction above 0 and cache.taps.layers to `replaced`, or the layer weights to 0"
        )
    if any(p.kind == "match" for p in config.phases):
        refuse_image_positions(run, "distill.phases: a `match` phase", "begin with `align`")


def _check_placement(run: RunConfig) -> None:
    place = run.placement.distill
    for number, phase in enumerate(run.distill.phases):
        where = f"distill.phases.{number}.batch: {phase.batch}"
        if phase.batch < place.workers:
            raise ConfigInvalid(
                f"{where} is less than placement.distill.workers ({place.workers}); every worker needs a row"
            )
        uneven = [w for w in range(place.min_workers or max(1, place.workers), place.workers + 1) if phase.batch % w]
        if place.strategy != "ddp" and uneven:
            raise ConfigInvalid(
                f"{where} does not divide evenly over {uneven[0]} workers, which strategy `{place.strategy}` needs; "
                "use another batch or number of workers, or strategy `ddp`"
            )


def check_cache(store: Store, run: RunConfig) -> None:
    """Checks that the cache is this run's: of its teacher and settings, from the samples that lie beside it.

    Raises:
        ArtifactDrift: it is not; names the files and settings that differ.
    """
    ref = run.ref("cache")
    made = require(store, ref).identity
    found = differences(made, identify(store, cache.stage(run))[0])
    if found:
        where, lines = store.path(str(ref)), "\n  ".join(found)
        raise ArtifactDrift(
            f"{where}: was made from another teacher, template or data, or with other settings, than this run's:\n  "
            f"{lines}\ncache under another name (cache.artifact), or put the run file right; a student of other layers "
            "than the cache was made for names the tapped ones in cache.taps.layers"
        )


def _distill(store: Store, job: TrainJob) -> dict[str, Any]:
    ref, place = job.run.ref("distill"), job.run.placement.distill
    restarts = _on_workers(store, job) if place.workers else _here(store, job)
    entries = [json.loads(line) for line in store.read(f"{ref}/{LOG}").splitlines()]
    return {
        "replaced": list(job.plan.replaced),
        "steps": entries[-1]["total"],
        "workers": entries[-1]["workers"],
        "strategy": place.strategy,
        "restarts": restarts,
        "backend": job.backend(store),
        "last": entries[-1],
    }


def _here(store: Store, job: TrainJob) -> int:
    """Trains in this process; nothing is lost that could be replaced."""
    mailbox: SimpleQueue[dict[str, Any] | str | None] = SimpleQueue()
    with _shown(mailbox, store, job):
        train_here(job, mailbox.put)
    return 0


def _on_workers(store: Store, job: TrainJob) -> int:
    with session():
        check_fits(job.run.placement, "distill")
        return _fit(store, job)


def _fit(store: Store, job: TrainJob) -> int:
    """Trains on workers to the end; returns how many groups of them had to be replaced."""
    from ray.util.queue import Queue

    mailbox = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here()})
    try:
        with _shown(mailbox, store, job):
            return _until_done(store, job, mailbox)
    finally:
        mailbox.shutdown(force=True)


@contextmanager
def _shown(mailbox: Any, store: Store, job: TrainJob) -> Iterator[None]:
    """Shows what the mailbox gets while the block runs."""
    viewer = threading.Thread(target=_show, args=(mailbox, store, job), daemon=True)
    viewer.start()
    try:
        yield
    finally:
        mailbox.put(None)
        viewer.join(timeout=10)


def _until_done(store: Store, job: TrainJob, mailbox: Any) -> int:
    """Trains with as many worker groups as it takes; returns how many had to be replaced.

    An error that the user can put right ends it at once: another group would meet it again. A group that ends before
    the training does has left nodes that are being taken away.

    Raises:
        WorkersLost: groups end, without an error, before they have come to a checkpoint.
    """
    folder = f"{job.run.ref('distill')}/{CHECKPOINTS}"
    journal = Journal(store, job.run.ref("distill"), job.command)
    restarts = failures = 0
    lost: Exception
    scratch = tempfile.TemporaryDirectory(prefix="decant-")
    try:
        while True:
            before = store.names(folder)
            try:
                _trainer(job, mailbox, f"{scratch.name}/{restarts}").fit()
            except Exception as error:
                if find_users_error(error) is not None:
                    raise
                lost, why, failed = error, f"a worker was lost ({_reason(error)})", 1
            else:
                if store.exists(f"{job.run.ref('distill')}/{BACKEND}"):
                    return restarts
                lost = WorkersLost(f"{job.run.ref('distill')}: the workers end before they have come to a checkpoint")
                why, failed = "nodes are being taken away", 0
            failures = failed if store.names(folder) != before else failures + 1
            if failures > job.run.placement.distill.retries:
                raise lost
            restarts += 1
            journal.note("lost", reason=why)
            mailbox.put(f"{why}; going on from the last checkpoint")
            _tell_shortage(job, mailbox)
    finally:
        scratch.cleanup()


def _tell_shortage(job: TrainJob, mailbox: Any) -> None:
    """Says what is missing where the nodes that are left do not hold the workers, which wait for others then."""
    try:
        check_fits(job.run.placement, "distill")
    except ConfigInvalid as error:
        mailbox.put(f"waiting for nodes; {error}")


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def _trainer(job: TrainJob, mailbox: Any, scratch: str) -> Any:
    """``scratch`` is Ray's run folder: it holds nothing of ours, position and weights are in the artifact."""
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as TrainRun
    from ray.train.torch import TorchTrainer

    place = job.run.placement.distill
    options = worker_options(place)
    named = {"CPU": options.pop("num_cpus"), "GPU": options.pop("num_gpus", 0), "memory": options.pop("memory", 0)}
    resources = {**named, **options.pop("resources", {})}
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job, "mailbox": mailbox},
        scaling_config=ScalingConfig(
            num_workers=place.workers if place.min_workers is None else (place.min_workers, place.workers),
            use_gpu=place.gpus_per_worker > 0,
            resources_per_worker={name: amount for name, amount in resources.items() if amount},
            **options,
        ),
        # a failed group is replaced by ``_until_done``, which knows what a user can put right
        run_config=TrainRun(name="distill", storage_path=scratch, failure_config=FailureConfig(max_failures=0)),
    )


def _show(mailbox: Any, store: Store, job: TrainJob) -> None:
    """Shows what rank 0 says and reports, and tells the trackers, until the closing None."""
    folder = Path(store.path(f"{job.run.ref('distill')}/{TRACKED}") if store.local else f"{TRACKED}-{job.run.name}")
    with (
        Progress("distill", None, "steps") as progress,
        open_trackers(job.run.placement.distill.trackers, job.run, folder, progress.say) as tracked,
    ):
        while (entry := mailbox.get()) is not None:
            if isinstance(entry, str):
                progress.say(entry)
                continue
            shown = ("kl", "ce", "held_out_kl") if entry["kind"] == "distill" else ("loss",)
            note = " ".join(f"{k} {entry[k]:.4f}" for k in shown if k in entry)
            progress.update(entry["done"], f"{entry['kind']} {note}", entry["total"])
            tracked.log(entry, entry["done"])
