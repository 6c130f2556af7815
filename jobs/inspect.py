"""Shows what is on disk of each stage of a run."""

import json

from rich.console import Console
from rich.table import Table as Shown

from jobs.stages import NAMES, open_store
from pipeline.folders import text_config
from pipeline.stage import read_record, require
from pipeline.store import Store
from pipeline.verify import Check, drop, targets_check, verify
from schemas.config import CacheConfig, RunConfig
from schemas.errors import ShardCorrupt
from schemas.tables import SAMPLES, Table, targets_table


def verify_run(run: RunConfig, out: Console, *, repair: bool) -> None:
    """Verifies every finished stage of the run; with ``repair``, removes what its stage can make again.

    Raises:
        ShardCorrupt: something is damaged; names all of it.
    """
    store = open_store(run)
    damaged: list[str] = []
    for name in NAMES:
        ref = run.ref(name)
        problems = verify(store, ref, *_rows_check(store, run, name, sound=not damaged))
        for problem in problems:
            damaged.append(f"{store.path(f'{ref}/{problem.name}')}: {problem.what}")
        if problems and repair:
            drop(store, ref, problems)
            out.print(f"[yellow]{ref}[/]: removed what is damaged; `decant {name} RUN.yaml` makes it again")
        elif not problems and store.exists(ref.record_path):
            out.print(f"[green]{ref}[/] is as it was written")
    if damaged:
        raise ShardCorrupt("\n  ".join([f"{len(damaged)} objects are damaged:", *damaged]))


def _rows_check(store: Store, run: RunConfig, name: str, *, sound: bool) -> tuple[Table | None, Check | None]:
    """The table of a stage's shards and the check of their rows, as the artifact on disk was made."""
    if name == "prepare":
        return SAMPLES, None
    if name != "cache" or not store.exists(run.ref("cache").record_path):
        return None, None
    try:
        record = require(store, run.ref("cache"))
    except ShardCorrupt:
        return None, None
    config = CacheConfig.model_validate(record.config["cache"])
    table = targets_table(config, record.identity["settings"]["taps"]["layers"])
    if not sound:  # rows are compared with their samples, which must be sound themselves
        return table, None
    return table, targets_check(store, run.ref("prepare"), config, text_config(run.teacher.path)["vocab_size"])


def show(run: RunConfig, out: Console, *, details: bool) -> None:
    """Prints a table of the stages and, with ``details``, each finished stage's result."""
    store = open_store(run)
    table = Shown("stage", "artifact", "state", "fingerprint", "seconds", title=store.root)
    records = {}
    for name in NAMES:
        ref = run.ref(name)
        record = read_record(store, ref)
        if record:
            records[name] = record
            table.add_row(
                name, str(ref), "[green]done[/]", record.fingerprint[:8], f"{record.provenance['seconds']:.1f}"
            )
        else:
            state = "[yellow]unfinished[/]" if store.exists(ref.identity_path) else "not made"
            table.add_row(name, str(ref), state, "", "")
    out.print(table)
    if details:
        for name, record in records.items():
            out.print(f"[bold]{name}[/]", json.dumps(record.result, indent=1), sep="\n")
