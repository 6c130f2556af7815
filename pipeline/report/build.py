"""The report of a run: figures collected from the finished artifacts, as JSON and as one self-contained HTML page."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.report.bench import bench_section
from pipeline.report.blocks import Cell, Page, plain, seconds, share, size
from pipeline.report.curves import distribution_section, training_section
from pipeline.report.economics import economics_section
from pipeline.report.probes import probes_section
from pipeline.report.provenance import provenance_section
from pipeline.report.quality import benchmarks_section, exact_match_section
from pipeline.report.svg import WHO
from pipeline.stage import read_record, require
from pipeline.store import Store
from schemas.artifacts import ArtifactRecord, ArtifactRef

# Bytes of one logit in the 16-bit types in which logits are usually kept.
LOGIT_BYTES = 2
# What the record of `evaluate` says beside the contestants' own figures.
EVALUATED = ("recovery", "recoveries", "distribution")
Report = Mapping[str, Any]


@dataclass(frozen=True)
class ReportSource:
    """Where the figures are: each stage's artifact, and the training curve's object in the store.

    ``vocabulary`` is the teacher's number of tokens, where it is known. ``planned`` (as ``decant plan --json`` has it)
    and ``bench`` (as ``decant bench`` writes it) come from elsewhere, where they are there.
    """

    refs: dict[str, ArtifactRef]
    curve: str
    vocabulary: int | None = None
    planned: dict[str, Any] | None = None
    bench: dict[str, Any] | None = field(default=None)


def collect(store: Store, source: ReportSource) -> dict[str, Any]:
    """All figures of the report; of a stage that is unfinished there are none.

    Raises:
        ArtifactMissing: no stage is finished.
        ShardCorrupt: a record is damaged.
    """
    found = {name: read_record(store, ref) for name, ref in source.refs.items()}
    records = {name: record for name, record in found.items() if record}
    if not records:
        require(store, next(iter(source.refs.values())))
    report: dict[str, Any] = {
        "run": _run(records),
        **_evaluation(records.get("evaluate")),
        "stages": {name: _stage(record) for name, record in records.items()},
        "unfinished": [name for name in found if name not in records],
        "curve": [],
        "versions": list(records.values())[-1].provenance["versions"],
    }
    if "cache" in records:
        report["cache"] = _cache(records["cache"], source.vocabulary)
    if "distill" in records:
        report["curve"] = [json.loads(line) for line in store.read(source.curve).splitlines()]
        report["versions"] = records["distill"].provenance["versions"]
    return report | {name: its for name in ("planned", "bench") if (its := getattr(source, name))}


def _run(records: Mapping[str, ArtifactRecord]) -> dict[str, Any]:
    config = list(records.values())[-1].config
    found = {"name": config["name"], "teacher": config["teacher"]["path"]}
    if "distill" in records:
        student = records["distill"].identity["settings"]["student"]
        replaced = records["distill"].result["replaced"]
        found |= {"replaced_layers": replaced, "decoder_layers": student["layers"], "init": student["init"]}
    return found


def _evaluation(record: ArtifactRecord | None) -> dict[str, Any]:
    return {key: record.result[key] for key in (*WHO, *EVALUATED) if key in record.result} if record else {}


def _cache(record: ArtifactRecord, vocabulary: int | None) -> dict[str, Any]:
    logits = {} if vocabulary is None else {"full_logits_bytes_per_response_token": LOGIT_BYTES * vocabulary}
    return {**record.result, **logits, **({} if vocabulary is None else {"vocabulary": vocabulary})}


def _stage(record: ArtifactRecord) -> dict[str, Any]:
    """Provenance as the record has it; records from before commands were kept have no history."""
    return {"artifact": record.ref, "fingerprint": record.fingerprint, **record.provenance}


def page(report: Report) -> str:
    """The report as HTML that needs no other file; what it has no figures of is absent."""
    sections = (
        exact_match_section(report),
        benchmarks_section(report),
        probes_section(report),
        distribution_section(report),
        training_section(report),
        economics_section(report),
        bench_section(report.get("bench")),
        provenance_section(report),
    )
    run = report["run"]
    shown = [section for section in sections if section]
    return Page(f"Decant report: {run['name']}", _lead(run), _tiles(report), shown).html()


def _lead(run: Mapping[str, Any]) -> str:
    if "replaced_layers" not in run:
        return f"Teacher {run['teacher']}; no student has been trained yet."
    layers = ", ".join(map(str, run["replaced_layers"]))
    return (
        f"{len(run['replaced_layers'])} of {run['decoder_layers']} attention layers ({layers}) of {run['teacher']} "
        f"replaced by Mamba-2 mixers (init {run['init']}) and distilled from the teacher's cache."
    )


def _tiles(report: Report) -> list[tuple[Cell, str]]:
    """The few figures that are looked for first."""
    kl = report.get("student", {}).get("held_out_kl")
    targets = report.get("cache", {}).get("bytes_per_response_token")
    spent = [stage["seconds"] for stage in report["stages"].values()]
    tiles = [
        (share(report.get("recovery")), "of the teacher's exact match"),
        (plain(kl), "held-out KL, nats a token"),
        (size(targets), "targets a response token"),
        (seconds(sum(spent) if spent else None), "all stages"),
    ]
    return [(cell, text) for cell, text in tiles if cell.value is not None]
