"""The section of provenance: stages with fingerprints, what happened to them, versions and hardware."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pipeline.report.blocks import Cell, Section, Table, code, count, seconds
from pipeline.report.tasks import Report

# Digits of a fingerprint that are shown; two results of one store never share so many.
DIGITS = 12
Made = Mapping[str, Any]


def provenance_section(report: Report) -> Section | None:
    """Every finished stage, and the stages that are not."""
    stages: Mapping[str, Made] = report.get("stages") or {}
    if not stages:
        return None
    rows = [
        [Cell(name), code(s["artifact"]), code(s["fingerprint"][:DIGITS]), _moment(s), seconds(s["seconds"])]
        for name, s in stages.items()
    ]
    tables = [Table("Stages", ["stage", "artifact", "fingerprint", "began (UTC)", "took"], rows, left=4)]
    tables += [table for table in (_commands(stages), _losses(stages), _again(stages), _software(stages)) if table.rows]
    missing = report.get("unfinished") or []
    notes = [f"Not finished, and so not in this report: {', '.join(missing)}."] if missing else []
    return Section("provenance", "Where it came from", (), tables, notes)


def _moment(made: Made) -> Cell:
    if made.get("started") is None:
        return Cell("–")
    return Cell(f"{datetime.fromtimestamp(made['started'], UTC):%Y-%m-%d %H:%M}", made["started"])


def _history(stages: Mapping[str, Made]) -> list[tuple[str, Made]]:
    """Stage and command, of all commands that worked on a stage."""
    return [
        (name, command)
        for name, made in stages.items()
        for command in (made.get("history") or {"commands": []})["commands"]
    ]


def _commands(stages: Mapping[str, Made]) -> Table:
    rows = []
    for name, command in _history(stages):
        lost, hosts = count(len(command.get("lost", ()))), Cell(", ".join(command["hosts"]))
        took = seconds(command["seconds"])
        said = Cell(command.get("error", ""))
        rows.append([Cell(name), Cell(command["outcome"]), hosts, count(command["workers"]), lost, took, said])
    head = ["stage", "outcome", "hosts", "workers started", "lost", "took", "error"]
    return Table("Commands", head, rows, left=3)


def _losses(stages: Mapping[str, Made]) -> Table:
    rows = [
        [Cell(name), _moment({"started": lost.get("at")}), Cell(lost.get("reason", ""))]
        for name, command in _history(stages)
        for lost in command.get("lost", ())
    ]
    return Table("Workers that were lost and replaced", ["stage", "when (UTC)", "why"], rows, left=3)


def _again(stages: Mapping[str, Made]) -> Table:
    rows = [
        [Cell(name), code(shard), count(times)]
        for name, made in stages.items()
        for shard, times in (made.get("history") or {}).get("shards_begun_again", {}).items()
    ]
    return Table("Shards begun more than once", ["stage", "shard", "times"], rows, left=2)


def _software(stages: Mapping[str, Made]) -> Table:
    """A column for each set of versions that stages were made with, most often one."""
    sets: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for name, made in stages.items():
        sets.setdefault(_versions(made), []).append(name)
    names = list(dict.fromkeys(package for versions in sets for package, _ in versions))
    rows = [[Cell(package), *(code(dict(versions).get(package, "–")) for versions in sets)] for package in names]
    heads: Sequence[str] = [", ".join(stages) for stages in sets.values()]
    return Table("Versions and hardware", ["", *heads], rows, left=1)


def _versions(made: Made) -> tuple[tuple[str, str], ...]:
    known = {"machine": made.get("machine"), "python": made.get("python"), **(made.get("versions") or {})}
    return tuple((name, str(value)) for name, value in known.items() if value is not None)
