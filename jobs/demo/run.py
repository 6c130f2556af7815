"""``decant demo``: draws the scenes, runs every stage and writes the report."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.carry import Code
from jobs.remote import LOCAL, run_stages
from jobs.report import write_report
from jobs.stages import NAMES, load_stage
from schemas.config import RunConfig
from schemas.runfile import dump_run, load_run

SEED = 0
# Stages that can be checked before the data is drawn.
NEEDS_NO_DATA = ("cache", "distill", "export")


def run_demo(
    run_file: Path | None,
    overrides: list[str],
    out: Console,
    *,
    train_scenes: int,
    test_scenes: int,
    dry_run: bool,
    on: str = LOCAL,
    code: Code = "upload",
) -> int:
    """Runs the demo; every part that is on disk already is kept. Prints where the report is.

    On a cluster the scenes are drawn here and travel with the job. Returns the exit code.
    """
    package = resources.files("jobs")
    run = load_run(run_file or Path(str(package / "configs" / "demo.yaml")), [*_teacher(run_file), *overrides])
    if dry_run:
        out.print(dump_run(run), end="", markup=False)
        out.print(f"# would draw {train_scenes} + {test_scenes} scenes, then run: {', '.join(NAMES)}", markup=False)
        return 0
    for name in NEEDS_NO_DATA:
        load_stage(name, run)
    _draw(run, train_scenes, test_scenes)
    if status := run_stages(NAMES, run, on, code, out):
        return status
    report, page = write_report(run)
    _summary(report, out)
    out.print(f"report: [bold]{page}[/] and {page.removesuffix('html')}json")
    return 0


def _teacher(run_file: Path | None) -> list[str]:
    """The shipped run file's teacher lies beside it, wherever the package is installed."""
    if run_file is not None:
        return []
    path = Path(str(resources.files("jobs") / "demo" / "teacher"))
    path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return ["teacher.path=" + json.dumps(str(path))]


def _draw(run: RunConfig, train_scenes: int, test_scenes: int) -> None:
    from jobs.demo.data import write_split
    from schemas.errors import StoreUnavailable

    try:
        write_split(Path(run.prepare.data), "train", train_scenes, SEED)
        write_split(Path(run.evaluate.data), "test", test_scenes, SEED)
    except OSError as error:
        raise StoreUnavailable(
            f"{Path(run.prepare.data).parent}: the demo's data cannot be written: {error.strerror or error}"
        ) from None


def _summary(report: dict[str, Any], out: Console) -> None:
    from rich.table import Table

    whos = [w for w in ("teacher", "student_untrained", "student") if w in report]
    table = Table("exact match", *whos)
    for group in report["teacher"]["exact_match"]:
        table.add_row(group, *(f"{100 * report[w]['exact_match'][group]['value']:.1f} %" for w in whos))
    out.print(table)
    if report["recovery"] is not None:
        out.print(f"the student keeps {100 * report['recovery']:.1f} % of the teacher's exact match")
