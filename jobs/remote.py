"""Runs stages where ``--on`` says: in a session of this machine, on a cluster that it is part of, or as a job there."""

import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from jobs.carry import RUN_FILE, Code, pack, paths_of
from jobs.stages import NAMES, open_store, run_named, store_of
from schemas.config import RunConfig
from schemas.errors import ConfigInvalid

LOCAL, AUTO = "local", "auto"
# As shells have it for a command that Ctrl-C ended.
INTERRUPTED = 130


def check_address(on: str) -> None:
    """Raises ConfigInvalid where ``--on`` names no place."""
    if on not in (LOCAL, AUTO) and not on.startswith(("http://", "https://")):
        raise ConfigInvalid(f"--on {on}: expected local, auto, or the address of a dashboard such as http://head:8265")


def stages_of(text: str) -> tuple[str, ...]:
    """The stages of ``--stages cache,distill``, in the order in which they run.

    Raises:
        ConfigInvalid: one is not a stage.
    """
    named = [name.strip() for name in text.split(",") if name.strip()]
    unknown = sorted(set(named) - set(NAMES))
    if unknown or not named:
        what = ", ".join(unknown) or "none given"
        raise ConfigInvalid(f"--stages {text}: {what}; expected some of {','.join(NAMES)}")
    return tuple(name for name in NAMES if name in named)


@dataclass(frozen=True)
class Work:
    """What a command does with a run, here or as a job.

    The files that the run's ``stages`` read travel with it, and ``files`` by name; ``arguments`` are those of `decant`
    in the folder where all of it arrives. ``here`` does it in this process and returns the exit code.
    """

    run: RunConfig
    stages: tuple[str, ...]
    arguments: tuple[str, ...]
    title: str
    here: Callable[[RunConfig], int]
    files: Mapping[str, str] = field(default_factory=dict)


def run_stages(names: Sequence[str], run: RunConfig, on: str, code: Code, out: Console) -> int:
    """Runs stages one after another; returns the exit code, which is a job's own where there is one."""
    title = ",".join(names)

    def here(run: RunConfig) -> int:
        for name in names:
            run_named(name, run, out)
        return 0

    return run_work(Work(run, tuple(names), ("run", RUN_FILE, "--stages", title), title, here), on, code, out)


def run_work(work: Work, on: str, code: Code, out: Console) -> int:
    """Does the work where ``--on`` says; returns its exit code."""
    check_address(on)
    if on == LOCAL:
        return work.here(work.run)
    return _run_here(work, code) if on == AUTO else _submit(work, on, code, out)


def _run_here(work: Work, code: Code) -> int:
    """Does the work with this process as the driver of the cluster that it is on."""
    from cluster.placement import check_reach
    from cluster.session import session

    # as a job, it has all of this with it
    inside = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    whole = work.run.model_copy(update={"store": store_of(work.run)})
    with tempfile.TemporaryDirectory(prefix="decant-") as folder:
        if not inside:
            pack(whole, work.stages, code, Path(folder))
        with session(None if inside else folder, join=True):
            store = open_store(whole)
            check_reach(store.root if store.local else None, _absolute(whole, work.stages))
            return work.here(whole)


def _absolute(run: RunConfig, names: Sequence[str]) -> dict[str, str]:
    """Settings with absolute paths that the stages read."""
    return {setting: path for setting, path in paths_of(run, names).items() if Path(path).is_absolute()}


def _submit(work: Work, on: str, code: Code, out: Console) -> int:
    from cluster.submission import connect, submit

    with tempfile.TemporaryDirectory(prefix="decant-") as folder:
        pack(work.run, work.stages, code, Path(folder))
        for name, text in work.files.items():
            Path(folder, name).write_text(text)
        client = connect(on)
        job = submit(client, [*work.arguments, "--on", AUTO], folder, work.run.name, work.title)
    out.print(f"job [bold]{job}[/] on {on}; Ctrl-C leaves it running")
    return follow_job(job, on, out)


def follow_job(job: str, on: str, out: Console) -> int:
    """Shows what a job prints until it ends, and returns its exit code; Ctrl-C leaves it running."""
    from cluster.submission import connect, follow

    check_address(on)
    try:
        return follow(connect(on), job, _write)
    except KeyboardInterrupt:
        out.print(
            f"\nthe job goes on; follow it with `decant jobs logs {job} --on {on}`, "
            f"end it with `decant jobs stop {job} --on {on}`",
            markup=False,
        )
        return INTERRUPTED


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def list_jobs(on: str, out: Console) -> None:
    """Prints our jobs on a cluster, the latest last."""
    from cluster.submission import connect, jobs

    found = jobs(connect(on))
    if not found:
        out.print(f"no jobs of decant on {on}")
        return
    for job in found:
        took = f", {job.seconds:,.0f} s" if job.seconds is not None else ""
        out.print(f"[bold]{job.id}[/]\n  {job.status}, {job.stages.replace(',', ', ')} of {job.run}, {job.began}{took}")


def stop_job(job: str, on: str, out: Console) -> None:
    """Ends a job; what it committed stays, and the same command goes on from there."""
    from cluster.submission import connect, stop

    if stop(connect(on), job):
        out.print(f"{job} is ending; what it committed stays, and the same command goes on from there")
    else:
        out.print(f"{job} was not running")
