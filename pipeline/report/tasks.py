"""The figures of tasks as an evaluation's record has them: whose they are, which belong to probes, and their cells."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.report.blocks import NOTHING, Cell, count, estimate, share
from pipeline.report.svg import NAMES, WHO

# What the names of tasks that are generated begin with.
PROBES = ("mqar", "recall", "phone", "needle", "copying", "reading", "probe")
# A figure of one length: `accuracy@512`, `accuracy@512/25%`; also `512`, `accuracy 512`, `length 512, depth 25 %`.
LENGTH = re.compile(
    r"(?:(?P<figure>.*?)[\s@_:/,-]+)?(?:length|tokens)?[\s_=]*(?P<length>[1-9][0-9,]*)(?:\s*tokens)?"
    r"(?:[\s@_:/,-]+(?:depth)?[\s_=]*(?P<depth>[0-9.]+)\s*%?)?"
)
Figures = Mapping[str, Any]
Report = Mapping[str, Any]


def contestants(report: Report, what: str) -> list[str]:
    """Who has figures of a kind (``exact_match``, ``tasks``), in the order in which they are shown."""
    return [who for who in WHO if report.get(who, {}).get(what)]


def is_probe(name: str, figures: Iterable[str]) -> bool:
    """Whether the task is a probe: by its name, or because it has figures of two or more lengths."""
    lengths = {found[1] for figure in figures if (found := parsed(figure))}
    return name.lower().startswith(PROBES) or len(lengths) > 1


def parsed(figure: str) -> tuple[str, int, float | None] | None:
    """A figure's name without its length (``accuracy`` where nothing is left), the length and the depth if any."""
    match = LENGTH.fullmatch(figure.strip())
    if match is None:
        return None
    name = re.sub(r"(?:(?:^|[\s@_:/,-]+)(?:length|tokens|at))?[\s@_:/,=-]*$", "", match["figure"] or "")
    depth = None if match["depth"] is None else float(match["depth"])
    # depths are written as a share or as a percentage
    return name or "accuracy", int(match["length"].replace(",", "")), depth and (depth / 100 if depth > 1 else depth)


@dataclass(frozen=True)
class Compared:
    """One task's figures by model, and their recoveries."""

    name: str
    models: Mapping[str, Figures]
    recoveries: Figures

    @property
    def figures(self) -> list[str]:
        """The names of all figures, the headline first."""
        return list(dict.fromkeys(figure for found in self.models.values() for figure in found))

    @property
    def head(self) -> list[str]:
        """The columns of ``cells``."""
        return ["n", *(NAMES[who] for who in self.models), "recovery"]

    def cells(self, figure: str) -> list[Cell]:
        """Number of units, each model's figure with its interval, and the recovery."""
        found = [its.get(figure) for its in self.models.values()]
        kept = self.recoveries.get(figure)
        recovered = share(kept.get("value"), kept.get("ci95")) if kept else Cell(NOTHING)
        return [count(next((its["n"] for its in found if its), None)), *map(estimate, found), recovered]


def compared(report: Report, *, probes: bool) -> list[Compared]:
    """The tasks of a report that are probes, or those that are benchmarks."""
    whos = contestants(report, "tasks")
    names = dict.fromkeys(name for who in whos for name in report[who]["tasks"])
    recoveries = report.get("recoveries") or {}
    found = [
        Compared(name, {who: report[who]["tasks"].get(name, {}) for who in whos}, recoveries.get(name, {}))
        for name in names
    ]
    return [task for task in found if is_probe(task.name, task.figures) == probes]
