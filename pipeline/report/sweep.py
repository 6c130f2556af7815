"""The page of a sweep: arms with mean and interval, every seed's point, orderings by axis, trials that failed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.report.bars import Dots, dot_chart
from pipeline.report.blocks import Cell, Chart, Page, Section, Table, code, count, plain, seconds, share
from pipeline.report.curves import PLAIN
from pipeline.report.orderings import Ordering, ordering
from pipeline.report.scales import brief, percent

Sweep = Mapping[str, Any]
Settings = Mapping[str, str]
# Figures that every sweep may have, as they are written; others are called what the table calls them.
WRITTEN = {
    "exact_match": "exact match",
    "held_out_kl": "held-out KL",
    "top1_agreement": "top-1 agreement",
    "ece": "ECE",
    "final_kl": "KL in the end",
    "final_ce": "cross-entropy in the end",
    "final_layer": "layer loss in the end",
}
STATES = {"done": "done", "failed": "failed", "pending": "not run yet"}


def sweep_page(table: Sweep) -> Page:
    """The page of a sweep's table (``table.json``)."""
    trials = table["trials"]
    states = [trial["state"] for trial in trials]
    seeds = sorted({trial["seed"] for trial in trials})
    tiles = [
        (count(len(table["arms"])), "arms"),
        (count(len(seeds)), "seeds"),
        *((count(states.count(state)), f"trials {text}") for state, text in STATES.items() if state in states),
        (seconds(sum(trial["seconds"] or 0.0 for trial in trials)), "all trials"),
    ]
    axes = "; ".join(f"{axis}: {', '.join(map(str, values))}" for axis, values in table["axes"].items())
    sections = [_arms(table), _orderings(table), _failed(trials), _trials(table)]
    return Page(f"Decant sweep: {table['name']}", axes, tiles, [s for s in sections if s])


def _cell(unit: str) -> Callable[..., Cell]:
    return share if unit == "share" else plain


def _axis_text(unit: str) -> Callable[[float], str]:
    return percent if unit == "share" else brief


def written(figure: str) -> str:
    """A figure's name as people write it."""
    return WRITTEN.get(figure, figure.replace("_", " "))


def _named(figure: str, known: Mapping[str, str]) -> str:
    """A figure with its unit and which way is better."""
    unit = "" if known["unit"] in ("share", "") else f", {known['unit']}"
    return f"{written(figure)}{unit} ({known['better']} is better)"


def _gain(value: float | None, ci95: Sequence[float] | None, unit: str) -> Cell:
    """A difference; of proportions in percentage points."""
    if value is None or unit != "share":
        return plain(value, ci95)
    small = f"{100 * ci95[0]:.1f} to {100 * ci95[1]:.1f}" if ci95 else ""
    return Cell(f"{100 * value:.1f} points", value, small)


def described(settings: Settings) -> str:
    """An arm as one line."""
    return ", ".join(f"{axis} {value}" for axis, value in settings.items())


def _arms(table: Sweep) -> Section:
    charts = [_dots(table, figure) for figure in table["figures"]]
    shown = [figure for figure in table["figures"] if any(figure in arm["figures"] for arm in table["arms"])]
    rows = [_arm(table, arm, shown) for arm in table["arms"]]
    head = [*table["axes"], "n", *map(written, shown)]
    notes = [
        "Means over seeds; small figures are Student's 95 % interval of the mean and the sample's standard deviation. "
        "In the plots a circle is one seed and the bar their mean; an interval wider than the plot ends at its edge."
    ]
    arms = Table("Arms", head, rows, left=max(1, len(table["axes"])))
    return Section("arms", "Arms", [c for c in charts if c], [arms], notes)


def _arm(table: Sweep, arm: Mapping[str, Any], shown: Sequence[str]) -> list[Cell]:
    settings = [Cell(str(arm["settings"].get(axis, "–"))) for axis in table["axes"]]
    return [*settings, count(arm["n"]), *(_mean(arm["figures"].get(f), table["figures"][f]["unit"]) for f in shown)]


def _mean(found: Mapping[str, Any] | None, unit: str) -> Cell:
    if not found:
        return Cell("–")
    cell, spread = _cell(unit)(found["mean"], found.get("ci95")), found.get("sd")
    small = [cell.small] if cell.small else []
    small += [f"sd {_cell(unit)(spread).text.removesuffix(' %')}"] if spread is not None else []
    return Cell(cell.text, cell.value, "; ".join(small))


def _dots(table: Sweep, figure: str) -> Chart | None:
    known = table["figures"][figure]
    rows = [_row(table, arm, figure) for arm in table["arms"]]
    unit = "" if known["unit"] == "share" else known["unit"]
    return dot_chart(_named(figure, known), rows, unit, PLAIN, _axis_text(known["unit"]))


def _row(table: Sweep, arm: Mapping[str, Any], figure: str) -> Dots:
    points = [
        (trial["figures"][figure], f"seed {trial['seed']}")
        for trial in table["trials"]
        if trial["settings"] == arm["settings"] and figure in (trial["figures"] or {})
    ]
    found = arm["figures"].get(figure) or {}
    return Dots(", ".join(map(str, arm["settings"].values())), points, found.get("mean"), found.get("ci95"))


def _orderings(table: Sweep) -> Section | None:
    """For each axis what each figure says, and the differences behind it."""
    tables = []
    for axis in table["axes"]:
        found = [o for figure in table["figures"] if (o := ordering(table, axis, figure))]
        if found:
            rows = [[Cell(_named(o.figure, table["figures"][o.figure])), Cell(str(o))] for o in found]
            tables.append(Table(f"{axis}, the best first", ["figure", "ordering"], rows, left=2))
            tables.append(_steps(table, axis, found))
    notes = [
        "Trials that agree in all but the axis are compared, seed by seed: > where Student's 95 % interval of the "
        "paired difference holds gains alone, ≥ where it does not. With few seeds ≥ is no sign that two are equal."
    ]
    return Section("orderings", "Orderings", (), tables, notes) if tables else None


def _steps(table: Sweep, axis: str, found: Sequence[Ordering]) -> Table:
    rows = []
    for o in found:
        unit = table["figures"][o.figure]["unit"]
        for step in o.steps:
            pair = [Cell(written(o.figure)), Cell(f"{step.better} {step.sign} {step.worse}")]
            means = [_cell(unit)(o.means[name]) for name in (step.better, step.worse)]
            rows.append([*pair, *means, _gain(step.gain, step.ci95, unit), count(step.seeds)])
    head = ["figure", "", "mean", "mean of the next", "gain", "seeds"]
    return Table(f"{axis}: differences between neighbours", head, rows, folded=True, left=2)


def _failed(trials: Sequence[Mapping[str, Any]]) -> Section | None:
    rows = [
        [Cell(described(trial["settings"])), count(trial["seed"]), code(trial["run"]), Cell(trial.get("error") or "")]
        for trial in trials
        if trial["state"] == "failed"
    ]
    if not rows:
        return None
    return Section(
        "failed", "Trials that failed", (), [Table("Failed", ["trial", "seed", "run", "error"], rows, left=4)]
    )


def _trials(table: Sweep) -> Section:
    figures = list(table["figures"])
    rows = [
        [
            Cell(described(trial["settings"])),
            count(trial["seed"]),
            code(trial["run"]),
            Cell(STATES.get(trial["state"], trial["state"])),
            seconds(trial["seconds"]),
            *(_cell(table["figures"][f]["unit"])((trial["figures"] or {}).get(f)) for f in figures),
        ]
        for trial in table["trials"]
    ]
    head = ["trial", "seed", "run", "state", "took", *map(written, figures)]
    return Section("trials", "All trials", (), [Table(f"{len(rows)} trials", head, rows, folded=True, left=4)])
