"""What a sweep's trials come to: one table folded from the records on disk, with means, spreads and paired differences.

Nothing is remembered elsewhere: the table can be made again at any time, also while trials run.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.observe import Seen, observe
from pipeline.store import Store
from schemas.errors import ConfigInvalid
from schemas.sweep import Settings, Sweep, Trial, described

TABLE = "table.json"
# The stages of a trial, in order.
TRIAL_STAGES = ("distill", "evaluate")
LEVEL = 0.95
# Figures that every trial has, or may have: which way is better, and the unit; a share is of 1.
FIGURES = {
    "exact_match": ("higher", "share"),
    "recovery": ("higher", "share"),
    "held_out_kl": ("lower", "nats"),
    "top1_agreement": ("higher", "share"),
    "ece": ("lower", "share"),
    "final_kl": ("lower", "nats"),
    "final_ce": ("lower", "nats"),
    "final_layer": ("lower", "share of the target"),
}


@dataclass(frozen=True)
class Difference:
    """One arm's figure less another's over the seeds that both have; ``sd`` and ``ci95`` need two of them."""

    mean: float
    sd: float | None
    ci95: tuple[float, float] | None
    seeds: tuple[int, ...]


def fold(store: Store, sweep: Sweep, errors: Mapping[str, str]) -> dict[str, Any]:
    """The sweep's table as it follows from the store.

    ``errors`` are of trials, by name, that ended without being able to write theirs down.
    """
    seen = [[observe(store, trial.run.ref(stage)) for stage in TRIAL_STAGES] for trial in sweep.trials]
    rows = [_row(t, one, two, errors.get(t.name)) for t, (one, two) in zip(sweep.trials, seen, strict=True)]
    found = dict.fromkeys(figure for row in rows for figure in row["figures"])
    # every trial answers the same benchmarks
    scales = next((_scales(evaluated.result) for _, evaluated in seen if evaluated.result), {})
    known = {name: {"better": better, "unit": unit} for name, (better, unit) in FIGURES.items()} | scales
    figures = {name: known[name] for name in known if name in found}
    return {
        "name": sweep.config.name,
        "axes": {axis: list(values) for axis, values in sweep.config.axes.items()},
        "figures": figures,
        "trials": rows,
        "arms": [_arm(arm, rows, list(figures)) for arm in sweep.config.combinations()],
    }


def write_table(store: Store, sweep: Sweep, table: Mapping[str, Any]) -> str:
    """Commits the table in the place of an earlier one; returns its path."""
    name = f"{sweep.ref}/{TABLE}"
    store.write(name, (json.dumps(table, indent=1) + "\n").encode())
    return store.path(name)


def _row(trial: Trial, trained: Seen, evaluated: Seen, error: str | None) -> dict[str, Any]:
    done = trained.state == evaluated.state == "done"
    told = [stage.error or "" for stage in (trained, evaluated) if stage.state == "failed"]
    why = None if done else next(iter(told), error)
    return {
        "settings": trial.settings,
        "seed": trial.seed,
        "run": str(trial.run.ref("distill")).partition("/")[2],
        "state": "done" if done else "pending" if why is None else "failed",
        "seconds": round((trained.seconds or 0.0) + (evaluated.seconds or 0.0), 3) if done else None,
        "figures": _figures(trained.result or {}, evaluated.result or {}) if done else {},
        "error": why,
    }


def _figures(trained: Mapping[str, Any], evaluated: Mapping[str, Any]) -> dict[str, float]:
    """The figures of one finished trial; what was not measured is absent."""
    student, last = evaluated["student"], trained["last"]
    found: dict[str, float | None] = {
        "exact_match": student["exact_match"]["overall"]["value"],
        "recovery": evaluated["recovery"],
        "held_out_kl": student["held_out_kl"],
    }
    for task, figures in student.get("tasks", {}).items():
        headline = next(iter(figures), None)
        found |= {_headline(task, headline): figures[headline]["value"]} if headline else {}
    if distribution := evaluated.get("distribution"):
        found |= {"top1_agreement": distribution["top1_agreement"]["value"], "ece": distribution["ece"]}
    found |= {f"final_{name}": last[name] for name in ("kl", "ce") if name in last}
    if layers := [value for name, value in last.items() if name.startswith("layer_")]:
        found["final_layer"] = statistics.fmean(layers)
    return {name: value for name, value in found.items() if value is not None}


def _scales(evaluated: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What the headlines of an evaluation's tasks are counted in; of all of them more is better."""
    known = {}
    for task, figures in evaluated["student"].get("tasks", {}).items():
        for headline, figure in list(figures.items())[:1]:
            unit = "share" if figure["scale"] == 1 else f"of {figure['scale']:g}"
            known[_headline(task, headline)] = {"better": "higher", "unit": unit}
    return known


def _headline(task: str, figure: str) -> str:
    return f"{task} {figure}"


def _arm(arm: Settings, rows: Sequence[Mapping[str, Any]], figures: Sequence[str]) -> dict[str, Any]:
    done = [row["figures"] for row in rows if row["settings"] == arm and row["state"] == "done"]
    values = {name: [row[name] for row in done if name in row] for name in figures}
    return {
        "settings": arm,
        "n": len(done),
        "figures": {name: summary(found) for name, found in values.items() if found},
    }


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation and Student's 95 % interval of the mean; of one value the mean alone."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "sd": None, "ci95": None}
    sd = statistics.stdev(values)
    half = student_t(len(values) - 1) * sd / math.sqrt(len(values))
    return {"mean": mean, "sd": sd, "ci95": [mean - half, mean + half]}


def paired(table: Mapping[str, Any], figure: str, one: Settings, other: Settings) -> Difference:
    """``one`` arm's figure less the ``other``'s, seed by seed.

    Trials of one seed have the same order of samples and the same random numbers, so their difference spreads less
    than the arms themselves do.

    Raises:
        ConfigInvalid: they have no finished seed in common that has the figure.
    """
    found = [
        {
            row["seed"]: row["figures"][figure]
            for row in table["trials"]
            if row["settings"] == arm and figure in row["figures"]
        }
        for arm in (one, other)
    ]
    seeds = tuple(seed for seed in found[0] if seed in found[1])
    if not seeds:
        raise ConfigInvalid(
            f"{table['name']}: {described(one)} and {described(other)} have no finished seed in common with {figure}; "
            "run `decant ablate` to its end first"
        )
    result = summary([found[0][seed] - found[1][seed] for seed in seeds])
    interval = result["ci95"]
    return Difference(result["mean"], result["sd"], (interval[0], interval[1]) if interval else None, seeds)


def student_t(freedom: int, level: float = LEVEL) -> float:
    """The t within which Student's distribution of so many degrees of freedom has the central ``level`` of its mass."""
    low, high = 0.0, math.pi / 2
    # the interval halves each time: 60 leave nothing that float64 can tell
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """P(|T| < √ν·tan θ) as a finite sum (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
