"""``decant report``: the page of a run, of what is finished of it, or of a sweep's table."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.stages import NAMES, open_store
from schemas.config import RunConfig
from schemas.errors import ConfigInvalid, DecantError, StoreUnavailable
from schemas.runfile import load_run

# The page's name, and in the store that of its figures beside it.
PAGE, FIGURES = "report.html", "report.json"
# As `decant plan` has it where nothing else is asked for; only the plan's times and money depend on them.
ACCELERATOR, PASSES = "h100", 2.0
# What the page reads of a table and of its parts, and of a bench.
TABLE = ("name", "axes", "figures", "trials", "arms")
TRIAL, ARM = ("settings", "seed", "run", "state", "seconds", "figures"), ("settings", "n", "figures")
BENCH, POINT = ("points",), ("model", "engine", "batch", "context")


def report(target: str, overrides: Sequence[str], bench: Path | None, destination: Path | None, out: Console) -> None:
    """Writes the page of a run file or of a sweep's ``table.json``, and says where it is.

    Raises:
        ConfigInvalid: the target or the bench file is not what it is taken for.
        ArtifactMissing: no stage of the run is finished.
    """
    if destination is not None and destination.suffix != ".html":
        raise ConfigInvalid(f"--out {destination}: expected a file that ends with .html")
    if not target.endswith(".json"):
        written = write_report(load_run(target, overrides), bench, destination)[1]
    elif overrides or bench:
        raise ConfigInvalid(f"{target}: --set and --bench are for a run's report, and this is a sweep's table")
    else:
        written = write_sweep(target, destination)
    out.print(f"report: [bold]{written}[/]")


def write_report(
    run: RunConfig, bench: Path | None = None, destination: Path | None = None
) -> tuple[dict[str, Any], str]:
    """Writes ``report.json`` and ``report.html`` into the store; returns the figures and the page's path.

    With a ``destination`` the page goes there, and its figures beside it.
    """
    from pipeline.report.build import ReportSource, collect, page
    from schemas.artifacts import LOG

    refs = {name: run.ref(name) for name in NAMES}
    measured = read_bench(bench) if bench else None
    source = ReportSource(refs, f"{run.ref('distill')}/{LOG}", _vocabulary(run), _planned(run), measured)
    found = collect(open_store(run), source)
    figures, text = (json.dumps(found, indent=1) + "\n").encode(), page(found).encode()
    if destination is None:
        store = open_store(run)
        store.write(FIGURES, figures)
        store.write(PAGE, text)
        return found, store.path(PAGE)
    _write(destination.with_suffix(".json"), figures)
    _write(destination, text)
    return found, str(destination)


def write_sweep(table: str, destination: Path | None) -> str:
    """Writes the page of a sweep's table beside it, or to ``destination``; returns where it is."""
    from pipeline.report.sweep import sweep_page
    from pipeline.store import Store

    folder, _, name = table.rpartition("/")
    store = Store(folder or ("/" if table.startswith("/") else "."))
    try:
        data = store.fetch(name)
    except OSError as error:
        raise ConfigInvalid(f"{table}: cannot be read: {error}; `decant ablate` writes it") from None
    text = sweep_page(_sweep(data, table)).html().encode()
    if destination is not None:
        _write(destination, text)
        return str(destination)
    store.write(PAGE, text)
    return store.path(PAGE)


def read_bench(path: Path) -> dict[str, Any]:
    """The file that ``decant bench`` wrote.

    Raises:
        ConfigInvalid: it is missing or is another file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigInvalid(f"--bench {path}: cannot be read: {error.strerror}; `decant bench` writes it") from None
    found = _parsed(data, str(path), "bench.json, which `decant bench` writes", BENCH)
    _check(found["points"], POINT, f"{path}: points")
    return found


def _sweep(data: bytes, where: str) -> dict[str, Any]:
    found = _parsed(data, where, "table.json, which `decant ablate` writes", TABLE)
    _check(found["trials"], TRIAL, f"{where}: trials")
    _check(found["arms"], ARM, f"{where}: arms")
    _check(found["figures"].values(), ("better", "unit"), f"{where}: figures")
    return found


def _parsed(data: bytes, where: str, what: str, fields: Sequence[str]) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError as error:
        raise ConfigInvalid(f"{where}: expected {what}; it is no JSON: {error}") from None
    lacking = [name for name in fields if not isinstance(found, Mapping) or name not in found]
    if lacking:
        raise ConfigInvalid(f"{where}: expected {what}; it has no {', '.join(lacking)}")
    return dict(found)


def _check(entries: Any, fields: Sequence[str], where: str) -> None:
    for number, entry in enumerate(entries):
        lacking = [name for name in fields if not isinstance(entry, Mapping) or name not in entry]
        if lacking:
            raise ConfigInvalid(f"{where}: entry {number} has no {', '.join(lacking)}; make the file again")


def _vocabulary(run: RunConfig) -> int | None:
    """The teacher's number of tokens, None where the teacher is not here any more."""
    from pipeline.models import load_config

    try:
        return int(load_config(run.teacher).get_text_config().vocab_size)
    except DecantError:
        return None


def _planned(run: RunConfig) -> dict[str, Any] | None:
    """The plan without a probe, None where it cannot be made: teacher or data are not here any more."""
    from jobs.plan import as_json, make_plan

    try:
        return dict(json.loads(as_json(make_plan(run, ACCELERATOR, None, PASSES, 0))))
    except DecantError:
        return None


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise StoreUnavailable(f"--out {path}: cannot be written: {error.strerror or error}") from None
