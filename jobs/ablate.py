"""``decant ablate``: trains and evaluates every trial of a sweep from one cache, as Ray tasks, and tables the figures.

A trial is one task, whose process runs the stages ``distill`` and ``evaluate`` of its own run: what is finished is not
run again, and what was killed goes on from its checkpoint. The teacher answers once, in the base run's evaluation.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Shown

from cluster.placement import check_room, worker_options
from cluster.session import find_users_error, session
from cluster.submitted import submission_id
from jobs.carry import RUN_FILE, Code
from jobs.progress import Progress
from jobs.remote import Work, run_work
from jobs.stages import layer_plan, load_stage, open_store, run_named, tapped_layers
from jobs.train import needs_taps
from pipeline.ablation import TRIAL_STAGES, fold, write_table
from pipeline.journal import told
from pipeline.observe import observe
from pipeline.stage import read_record, run_stage, status
from pipeline.store import Store
from schemas.config import RunConfig
from schemas.errors import ConfigInvalid
from schemas.sweep import Sweep, Trial, described, load_sweep, room_of

SWEEP_FILE = "sweep.yaml"
# Seconds between two looks at the trials that run: as often as a training writes its log.
LOOK = 5.0
# Figures that the printed table has, besides the benchmarks'; `table.json` has them all.
SHOWN = {"exact_match": "exact match", "recovery": "recovery", "held_out_kl": "held-out KL"}


def ablate(path: Path, overrides: Sequence[str], out: Console, *, dry_run: bool, on: str, code: Code) -> int:
    """Runs what is missing of the sweep; prints its table. Returns the exit code, 1 where a trial failed.

    Raises:
        ConfigInvalid: the sweep, or any trial's run, cannot be carried out; nothing has been run then.
        DecantError: the base run fails.
    """
    sweep = load_sweep(path, overrides)
    check_trials(sweep)
    if dry_run:
        _preview(open_store(sweep.base), sweep, out)
        return 0
    stages = base_stages(sweep.base)
    work = Work(
        sweep.base,
        stages if "evaluate" in stages else (*stages, "evaluate"),
        ("ablate", SWEEP_FILE),
        "ablate",
        lambda base: run_sweep(sweep.at(base.store), out),
        {SWEEP_FILE: sweep.as_yaml(RUN_FILE)},
    )
    return run_work(work, on, code, out)


def base_stages(base: RunConfig) -> tuple[str, ...]:
    """The stages that the base run must have behind it: up to the teacher's answers, if it does not take them."""
    return ("prepare", "cache") if base.evaluate.teacher else ("prepare", "cache", "distill", "evaluate")


def check_trials(sweep: Sweep) -> None:
    """Refuses every arm that the stages refuse, or whose cache would not be the base run's.

    Raises:
        ConfigInvalid: names the arm and what to set.
    """
    tapped, some = tapped_layers(sweep.base), sweep.base.cache.taps.fraction > 0
    for trial in sweep.arms():
        where = f"sweep {sweep.config.name}: {described(trial.settings)}"
        replaced = layer_plan(trial.run).replaced
        lacking = some and needs_taps(trial.run) and not set(replaced) <= set(tapped)
        if lacking or tapped_layers(trial.run) != tapped:
            raise ConfigInvalid(
                f"{where}: replaces layers {list(replaced)}, but the base run's cache taps {list(tapped)}; all trials "
                "of a sweep have one cache: set cache.taps.layers to `all`, or to a list with every layer that a trial "
                "replaces, in the base run or under `set`, with a cache.artifact of its own"
            )
        try:
            load_stage("distill", trial.run)
        except ConfigInvalid as error:
            raise ConfigInvalid(f"{where}: {error}") from None


def run_sweep(sweep: Sweep, out: Console) -> int:
    """Runs the base run and the trials as far as they are missing; returns the exit code."""
    for name in base_stages(sweep.base):
        run_named(name, sweep.base, out)
    store = open_store(sweep.base)
    left = [trial for trial in sweep.trials if not _finished(store, trial)]
    errors = _run_trials(store, sweep, left) if left else {}
    table = fold(store, sweep, errors)
    where = write_table(store, sweep, table)
    show(table, out)
    out.print(f"table: [bold]{where}[/]")
    failed = [row for row in table["trials"] if row["state"] == "failed"]
    if failed:
        out.print(f"[red]{len(failed)} of {len(table['trials'])} trials failed[/]; the same command tries them again")
    return 1 if failed else 0


def _finished(store: Store, trial: Trial) -> bool:
    """Whether nothing of the trial is missing.

    Raises:
        ArtifactDrift: what is there of it was made from other settings.
    """
    return all(status(store, load_stage(name, trial.run)) == "done" for name in TRIAL_STAGES)


def _run_trials(store: Store, sweep: Sweep, left: Sequence[Trial]) -> dict[str, str]:
    """Runs the trials, as many at once as the cluster holds; returns the errors of those that failed, by name."""
    with session(), Progress("ablate", len(sweep.trials), "trials") as progress:
        import ray

        place = room_of(left[0].run)
        if not sweep.base.placement.autoscales:
            check_room(place, 1, "trial")
        # a trial whose worker is lost goes on from its checkpoint
        retries = sweep.base.placement.distill.retries
        remote = ray.remote(**worker_options(place), max_retries=retries)(run_trial)
        waiting = {remote.remote(trial.run, submission_id()): trial for trial in left}
        errors: dict[str, str] = {}
        while waiting:
            progress.update(len(sweep.trials) - len(waiting), _note(store, list(waiting.values()), errors))
            ready, _ = ray.wait(list(waiting), timeout=LOOK)
            for ref in ready:
                trial = waiting.pop(ref)
                if error := _error_of(ref):
                    errors[trial.name] = error
                    progress.say(f"{trial.name} failed: {error}")
            if ready:
                write_table(store, sweep, fold(store, sweep, errors))
        progress.update(len(sweep.trials), _note(store, [], errors))
    return errors


def _error_of(ref: Any) -> str | None:
    """What ended a trial's task, None where it came to its end.

    Raises:
        LocalRayletDiedError: the session itself is at its end.
    """
    import ray
    from ray.exceptions import LocalRayletDiedError

    try:
        ray.get(ref)
    except LocalRayletDiedError:
        raise
    except Exception as error:
        return told(find_users_error(error) or getattr(error, "cause", None) or error)
    return None


def run_trial(run: RunConfig, job: str | None) -> None:
    """Task: a trial's stages in this process, as far as they are missing; ``job`` is what Ray calls the driver."""
    store = open_store(run)
    for name in TRIAL_STAGES:
        run_stage(store, load_stage(name, run), job)


def _note(store: Store, waiting: Sequence[Trial], errors: Mapping[str, str]) -> str:
    """How many trials failed and run, and where the one stands that wrote its log last."""
    seen = {trial.name: observe(store, trial.run.ref("distill")) for trial in waiting}
    running = {name: stage for name, stage in seen.items() if stage.state == "running"}
    evaluating = [n for t in waiting if (n := t.name) not in running and seen[n].state == "done"]
    parts = [f"{len(errors)} failed", f"{len(running) + len(evaluating)} running"]
    logged = {name: stage for name, stage in running.items() if stage.training}
    if logged:
        name = min(logged, key=lambda n: logged[n].silent or 0.0)
        training = logged[name].training
        assert training is not None
        losses = " ".join(f"{loss} {value:.4f}" for loss, value in training.losses.items())
        parts.append(f"{name} at {training.done}/{training.total} {losses}")
    return ", ".join(parts)


def _preview(store: Store, sweep: Sweep, out: Console) -> None:
    """Prints what would be run, and what each trial is."""
    for name in base_stages(sweep.base):
        done = read_record(store, sweep.base.ref(name)) is not None
        out.print(f"{sweep.base.ref(name)} {'is done' if done else 'would be made'}", markup=False)
    table = Shown("trial", *sweep.config.axes, "seed", "", box=SIMPLE_HEAD)
    for trial in sweep.trials:
        done = all(read_record(store, trial.run.ref(name)) is not None for name in TRIAL_STAGES)
        state = "is done" if done else "would run"
        table.add_row(trial.name, *trial.settings.values(), str(trial.seed), state)
    out.print(table, soft_wrap=False)
    size = sweep.config.trial
    out.print(f"{len(sweep.trials)} trials, each with {size.cpus:g} CPU and {size.gpus:g} GPU")


def show(table: Mapping[str, Any], out: Console) -> None:
    """Prints each arm's means with their 95 % intervals, and what failed."""
    names = [f for f in table["figures"] if f in SHOWN or " " in f]
    shown = Shown(*table["axes"], "n", *(_title(name, table["figures"][name]) for name in names), box=SIMPLE_HEAD)
    for arm in table["arms"]:
        cells = (_cell(arm["figures"].get(name), table["figures"][name]["unit"]) for name in names)
        shown.add_row(*arm["settings"].values(), str(arm["n"]), *cells)
    out.print(shown, soft_wrap=False)
    for row in table["trials"]:
        if row["state"] == "failed":
            out.print(f"[red]{escape(row['run'])}[/] failed: {escape(row['error'])}")


def _title(name: str, figure: Mapping[str, str]) -> str:
    unit = {"share": "%"}.get(figure["unit"], figure["unit"])
    return ", ".join(filter(None, (SHOWN.get(name, name), unit)))


def _cell(found: Mapping[str, Any] | None, unit: str) -> str:
    """Mean ± half the interval's width; the mean alone where one trial has the figure."""
    if found is None:
        return "–"
    scale, digits = (100, 1) if unit == "share" else (1, 4 if unit == "nats" else 1)
    mean = f"{scale * found['mean']:.{digits}f}"
    if found["ci95"] is None:
        return mean
    return f"{mean} ± {scale * (found['ci95'][1] - found['ci95'][0]) / 2:.{digits}f}"
