"""Shows what is on disk of each stage of a run."""

import json

from rich.console import Console
from rich.table import Table

from jobs.stages import NAMES, open_store
from pipeline.stage import read_record
from schemas.config import RunConfig


def show(run: RunConfig, out: Console, *, details: bool) -> None:
    """Prints a table of the stages and, with ``details``, each finished stage's result."""
    store = open_store(run)
    table = Table("stage", "artifact", "state", "fingerprint", "seconds", title=store.root)
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
