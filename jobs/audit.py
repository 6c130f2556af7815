"""``decant inspect --audit``: runs the teacher again over a part of a cache's rows and compares, in this process.

Memory holds one shard, and the audited rows of as many as make a batch of the teacher.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as Shown

from jobs.progress import Progress
from jobs.stages import open_store, teacher_digests, teacher_of
from pipeline.audit import Difference, chosen_rows, compare
from pipeline.capture import PreparedSample, Teacher
from pipeline.data.collate import image_features
from pipeline.data.encoding import EncodedSample
from pipeline.data.processors import load_processor
from pipeline.data.samples import decode_samples
from pipeline.shards import Row, as_rows, read_manifest, read_shard, rows_of
from pipeline.stage import require
from pipeline.store import Store
from pipeline.verify import Problem, drop
from schemas.artifacts import ArtifactRecord, ArtifactRef
from schemas.canonical import differences
from schemas.config import RunConfig
from schemas.errors import ArtifactDrift, ShardCorrupt
from schemas.tables import SAMPLES, recorded_cache, targets_table

# Values named one by one: a screen of them; the shards are all named.
VALUES_NAMED = 20


@dataclass(frozen=True)
class Chosen:
    """One row to audit: its shard's name, the sample it was made from, and what the cache says."""

    shard: str
    sample: EncodedSample
    row: Row


@dataclass(frozen=True)
class Audited:
    """How one row differs from the teacher's."""

    shard: str
    sample_id: str
    differences: list[Difference]


@dataclass(frozen=True)
class Audit:
    """Which rows of which cache are audited, and what their samples and teacher are."""

    store: Store
    cache: ArtifactRef
    samples: ArtifactRef
    record: ArtifactRecord
    rows: dict[int, list[int]]

    @property
    def total(self) -> int:
        """Rows audited."""
        return sum(map(len, self.rows.values()))


def audit_cache(run: RunConfig, out: Console, fraction: float, *, repair: bool, dry_run: bool) -> None:
    """Audits a fraction of the rows of the run's cache; with ``repair``, removes the shards that are not the teacher's.

    Raises:
        ArtifactMissing: cache or samples are unfinished.
        ArtifactDrift: the cache was made by another teacher, or from other samples.
        ShardCorrupt: rows are not what the teacher gives, or a shard cannot be read; names the shards.
    """
    audit = plan_audit(run, fraction)
    rows = read_manifest(audit.store, audit.cache).rows
    fewer = f"; {fraction:g} of all is less than one" if fraction * rows < 1 else ""
    out.print(f"{audit.cache}: {audit.total:,} of {rows:,} rows are audited, in {len(audit.rows)} shards{fewer}")
    if dry_run:
        return
    problems: list[Problem] = []
    found = list(_compared(run, audit, problems))
    _table([d for row in found for d in row.differences], out)
    problems += [Problem(row.shard, _sentence(row.sample_id, d)) for row in found for d in row.differences if d.beyond]
    if not problems:
        out.print(f"[green]{audit.cache}[/]: these rows are what its teacher gives, but for rounding")
        return
    if repair:
        drop(audit.store, audit.cache, problems)
        out.print(f"[yellow]{audit.cache}[/]: removed these shards; `decant cache RUN.yaml` makes them again")
    raise ShardCorrupt(_verdict(audit, problems, repaired=repair))


def plan_audit(run: RunConfig, fraction: float) -> Audit:
    """Chooses the rows, after checking that teacher and samples are those of the cache; runs nothing."""
    store, cache = open_store(run), run.ref("cache")
    record = require(store, cache)
    _refuse_other_teacher(run, store, record)
    ((name, fingerprint),) = record.identity["inputs"].items()
    samples = ArtifactRef.parse(name)
    assert samples is not None, "a stage's inputs are spelt by ArtifactRef"
    there = require(store, samples).fingerprint
    if there != fingerprint:
        raise ArtifactDrift(
            f"{store.path(name)}: {cache} was made from samples with fingerprint {fingerprint[:8]}, these have "
            f"{there[:8]}: they were made anew since; remove {store.path(str(cache))} to make it from them"
        )
    ids: list[str] = []
    places: list[tuple[int, int]] = []
    for info in read_manifest(store, samples).shards:
        found = read_shard(store, samples, SAMPLES, info, ["sample_id"])["sample_id"].to_pylist()
        ids += found
        places += [(info.index, row) for row in range(len(found))]
    rows: dict[int, list[int]] = {}
    for i in chosen_rows(ids, fraction, record.identity["settings"]["seed"]):
        rows.setdefault(places[i][0], []).append(places[i][1])
    return Audit(store, cache, samples, record, rows)


def _refuse_other_teacher(run: RunConfig, store: Store, record: ArtifactRecord) -> None:
    found = differences(record.identity["settings"]["teacher"], teacher_digests(run.teacher))
    if found:
        raise ArtifactDrift(
            f"teacher.path: {run.teacher.path}: is not the teacher that made {store.path(record.ref)}:\n  "
            + "\n  ".join(found)
            + f"\nset teacher.path to that one (it was {record.config['teacher']['path']})"
        )


def _compared(run: RunConfig, audit: Audit, problems: list[Problem]) -> Iterator[Audited]:
    """The audited rows with their differences; a shard that cannot be read becomes a problem."""
    config, tapped = recorded_cache(audit.record)
    source, place = teacher_of(run), run.placement.cache
    processor, done = load_processor(source), 0
    with (
        closing(Teacher(source, config, tapped, run.placement.device, place)) as teacher,
        Progress("audit", audit.total, "rows") as progress,
    ):
        progress.update(0)
        for group in _groups(audit, place.batch, problems):
            samples = [chosen.sample for chosen in group]
            columns = teacher.capture([PreparedSample(s, image_features(processor, s.images)) for s in samples])
            fresh = rows_of(as_rows(teacher.table, columns))
            for chosen, row in zip(group, fresh, strict=True):
                found = compare(config, len(chosen.sample.input_ids), chosen.row, row)
                yield Audited(chosen.shard, chosen.sample.sample_id, found)
            done += len(group)
            progress.update(done)


def _groups(audit: Audit, batch: int, problems: list[Problem]) -> Iterator[list[Chosen]]:
    """The audited rows in groups of a batch or more, whichever shards they come from."""
    table = targets_table(*recorded_cache(audit.record))
    samples, targets = (read_manifest(audit.store, ref).shards for ref in (audit.samples, audit.cache))
    group: list[Chosen] = []
    for index, rows in audit.rows.items():
        taken = pa.array(rows)
        inputs = decode_samples(read_shard(audit.store, audit.samples, SAMPLES, samples[index]).take(taken))
        try:
            cached = rows_of(read_shard(audit.store, audit.cache, table, targets[index]).take(taken))
        except ShardCorrupt as error:
            problems.append(Problem(targets[index].name, str(error)))
            continue
        group += [Chosen(targets[index].name, s, r) for s, r in zip(inputs, cached, strict=True)]
        if len(group) >= batch:
            yield group
            group = []
    if group:
        yield group


def _table(found: Sequence[Difference], out: Console) -> None:
    """Prints the differences by field."""
    table = Shown("field", box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for header in ("rows", "equal", "median", "99 %", "largest", "tolerance", "beyond"):
        table.add_column(header, justify="right", no_wrap=True)
    for field in dict.fromkeys(d.field for d in found):
        own = [d for d in found if d.field == field]
        errors: Any = [d.error for d in own]
        figures = (np.median(errors), np.quantile(errors, 0.99), max(errors), min(d.tolerance for d in own))
        equal, beyond = f"{100 * np.mean([d.equal for d in own]):.1f} %", sum(d.beyond for d in own)
        marked = f"[red]{beyond}[/]" if beyond else "0"
        table.add_row(field, f"{len(own):,}", equal, *(f"{x:.1e}" for x in figures), marked)
    out.print(table, soft_wrap=False)


def _sentence(sample_id: str, difference: Difference) -> str:
    return (
        f"{sample_id}: {difference.field}: expected {difference.expected}, got {difference.got} "
        f"(off by {difference.error:.2g}, tolerance {difference.tolerance:.2g})"
    )


def _verdict(audit: Audit, problems: list[Problem], *, repaired: bool) -> str:
    shards = sorted({p.name for p in problems})
    todo = "" if repaired else "; with `--repair` they are removed, and `decant cache RUN.yaml` makes just them again"
    lines = [f"{len(shards)} of {len(audit.rows)} audited shards are not what the teacher gives{todo}:"]
    lines += [audit.store.path(f"{audit.cache}/{name}") for name in shards]
    lines += [f"{p.name}: {p.what}" for p in problems[:VALUES_NAMED]]
    return "\n  ".join(
        [*lines, *([f"and {len(problems) - VALUES_NAMED} more"] if len(problems) > VALUES_NAMED else [])]
    )
