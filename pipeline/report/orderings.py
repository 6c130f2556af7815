"""How the values of a sweep's axis rank by a figure, and what of that the seeds bear out.

Two values are compared where trials agree in all else, seed included, so that neither the other axes nor the order of
samples speaks for one of them.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pipeline.ablation import summary

# Trials by what they agree in: settings of the other axes, and the seed.
Cell = tuple[tuple[tuple[str, str], ...], int]


@dataclass(frozen=True)
class Step:
    """From one value of the ranking to the next: how much better it is (``gain`` above 0), by so many seeds."""

    better: str
    worse: str
    gain: float | None
    ci95: Sequence[float] | None
    seeds: int

    @property
    def sign(self) -> str:
        """``>`` where the interval holds only gains, ``≥`` where it does not or there is none."""
        return ">" if self.ci95 and self.ci95[0] > 0 else "≥"


@dataclass(frozen=True)
class Ordering:
    """The values of an axis by one figure, the best first, with their means and the steps between neighbours."""

    axis: str
    figure: str
    means: Mapping[str, float]
    steps: Sequence[Step]

    def __str__(self) -> str:
        names = list(self.means)
        return names[0] + "".join(f" {step.sign} {name}" for step, name in zip(self.steps, names[1:], strict=True))


def ordering(table: Mapping[str, Any], axis: str, figure: str) -> Ordering | None:
    """The ranking of an axis's values by a figure, None where fewer than two of them have it.

    Means are over the trials that every ranked value has a counterpart of; where there are none, over all.
    """
    found = _values(table, axis, figure)
    if len(found) < 2:
        return None
    shared = set.intersection(*(set(cells) for cells in found.values()))
    means = {
        name: statistics.fmean(v for c, v in cells.items() if c in shared or not shared)
        for name, cells in found.items()
    }
    lower = table["figures"][figure]["better"] == "lower"
    ranked = sorted(means, key=lambda name: means[name] if lower else -means[name])
    steps = [_step(a, found[a], b, found[b], -1.0 if lower else 1.0) for a, b in pairwise(ranked)]
    return Ordering(axis, figure, {name: means[name] for name in ranked}, steps)


def _values(table: Mapping[str, Any], axis: str, figure: str) -> dict[str, dict[Cell, float]]:
    """The figure by the axis's value and by what else tells a trial."""
    found: dict[str, dict[Cell, float]] = {}
    for trial in table["trials"]:
        value = (trial.get("figures") or {}).get(figure)
        if value is not None and axis in trial["settings"]:
            rest = tuple(sorted((k, v) for k, v in trial["settings"].items() if k != axis))
            found.setdefault(trial["settings"][axis], {})[rest, trial["seed"]] = value
    return found


def _step(better: str, one: Mapping[Cell, float], worse: str, other: Mapping[Cell, float], sign: float) -> Step:
    by_seed: dict[int, list[float]] = {}
    for cell in one:
        if cell in other:
            by_seed.setdefault(cell[1], []).append(sign * (one[cell] - other[cell]))
    gains = [statistics.fmean(values) for values in by_seed.values()]
    if not gains:
        return Step(better, worse, None, None, 0)
    found = summary(gains)
    return Step(better, worse, found["mean"], found["ci95"], len(gains))
