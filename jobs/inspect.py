"""``decant inspect``: lists the artifacts of a run's store and verifies the run's own."""

import json
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as Shown

from jobs.describe import describe
from jobs.figures import human_bytes, moment
from jobs.stages import NAMES, open_store
from pipeline.inventory import Entry, artifacts, entry
from pipeline.stage import require
from pipeline.store import Store
from pipeline.verify import Check, drop, targets_check, verify
from schemas.artifacts import ArtifactRef
from schemas.config import RunConfig
from schemas.errors import ConfigInvalid, ShardCorrupt
from schemas.tables import SAMPLES, Table, recorded_cache, recorded_table

COLOURS = {"done": "green", "unfinished": "yellow", "damaged": "red", "not made": "dim"}
PICTURES = (".png", ".svg")


def inspect(
    run: RunConfig,
    out: Console,
    *,
    artifact: str | None,
    check: bool,
    fraction: float | None,
    repair: bool,
    picture: Path | None,
    dry_run: bool,
) -> None:
    """Lists, describes, verifies or audits, whatever was asked for.

    Raises:
        ConfigInvalid: what was asked for does not go together.
        ShardCorrupt: something is damaged, or is not what the teacher gives.
    """
    ref = None if artifact is None else _ref(run, artifact)
    checks = check or fraction is not None or repair
    if ref and checks:
        raise ConfigInvalid(f"{artifact}: --verify, --audit and --repair look at the run's own artifacts; leave it out")
    if picture and (ref is None or ref.kind not in ("prepare", "cache") or picture.suffix not in PICTURES):
        raise ConfigInvalid(
            f"--picture {picture}: expected a file that ends with {' or '.join(PICTURES)}, and an artifact of prepare "
            f"or cache to draw: `decant inspect RUN.yaml cache --picture cache.png`"
        )
    if check or (repair and fraction is None):
        verify_run(run, out, repair=repair and not dry_run)
    if fraction is not None:
        from jobs.audit import audit_cache

        audit_cache(run, out, fraction, repair=repair, dry_run=dry_run)
    if ref:
        describe(open_store(run), ref, out, None if dry_run else picture)
    elif not checks:
        show(run, out, details=not dry_run)


def _ref(run: RunConfig, artifact: str) -> ArtifactRef:
    ref = run.ref(artifact) if artifact in NAMES else ArtifactRef.parse(artifact)
    if ref is None or ref.kind not in NAMES:
        raise ConfigInvalid(
            f"{artifact}: expected a stage ({', '.join(NAMES)}) or an artifact such as {run.ref('cache')}; "
            "`decant inspect RUN.yaml` lists them"
        )
    return ref


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
    table, (config, _) = recorded_table(record), recorded_cache(record)
    if not sound:  # rows are compared with their samples, which must be sound themselves
        return table, None
    from pipeline.models import load_config

    vocabulary = load_config(run.teacher).get_text_config().vocab_size
    return table, targets_check(store, run.ref("prepare"), config, vocabulary)


def show(run: RunConfig, out: Console, *, details: bool) -> None:
    """Prints every artifact of the run's store, its own ones marked, and with ``details`` those ones' results."""
    store = open_store(run)
    own = [run.ref(name) for name in NAMES]
    known = artifacts(store, NAMES)
    refs = sorted({*known, *own}, key=lambda r: (NAMES.index(r.kind), r.name, r.version))
    entries = [entry(store, ref) for ref in refs]
    table = Shown(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("artifact", overflow="fold")
    for header in ("state", "rows", "shards", "size", "made", "fingerprint"):
        table.add_column(header, justify="right" if header in ("rows", "shards", "size") else "left", no_wrap=True)
    for found in entries:
        table.add_row(*_line(found, own=found.ref in own))
    out.print(f"[bold]{store.root}[/]: ● of this run")
    out.print(table, soft_wrap=False)
    if details:
        for found in entries:
            if found.record and found.ref in own:
                out.print(f"[bold]{found.ref.kind}[/]", json.dumps(found.record.result, indent=1), sep="\n")


def _line(found: Entry, *, own: bool) -> list[str]:
    """The cells of one artifact."""
    name = f"{'●' if own else ' '} {found.ref}"
    state = f"[{COLOURS[found.state]}]{found.state}[/]"
    shards, files = str(found.shards or ""), human_bytes(found.bytes) if found.files else ""
    if found.record is None:
        return [name, state, "", shards, files, "", ""]
    rows = "" if found.rows is None else f"{found.rows:,}"
    day = moment(found.record.provenance["started"]).partition(" ")[0]
    return [name, state, rows, shards, files, day, found.record.fingerprint[:8]]
