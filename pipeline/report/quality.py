"""The sections of quality: exact match by group, and benchmarks of teacher, student and untrained student."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.bars import Bar, bar_chart
from pipeline.report.blocks import Cell, Chart, Section, Table, count, estimate, plain
from pipeline.report.grids import radar_chart
from pipeline.report.scales import percent
from pipeline.report.svg import NAMES, WHO
from pipeline.report.tasks import Compared, Figures, Report, compared, contestants

# Benchmarks that make a polygon.
CORNERS = 3


def exact_match_section(report: Report) -> Section | None:
    """Exact match on the held-out questions, overall and by group."""
    whos = contestants(report, "exact_match")
    if not whos:
        return None
    scores = {who: report[who]["exact_match"] for who in whos}
    groups = list(dict.fromkeys(group for found in scores.values() for group in found))
    bars = [(group, _bars(scores, group)) for group in groups]
    chart = bar_chart("Exact match by group of questions", bars, "exact match", text=percent, top=1.0)
    table = Table("Exact match", ["group", "n", *(NAMES[who] for who in whos)], _match_rows(report, scores, groups))
    note = "Greedy generation, strict equality; intervals are 95 % Wilson."
    return Section("match", "Exact match on held-out questions", [chart] if chart else [], [table], [note])


def _bars(scores: Mapping[str, Figures], name: str) -> list[Bar]:
    found = [(who, its[name]) for who, its in scores.items() if its.get(name) and its[name]["value"] is not None]
    return [Bar(WHO[who], NAMES[who], *_scaled(its)) for who, its in found]


def _scaled(found: Mapping[str, Any]) -> tuple[float, list[float] | None]:
    """Value and interval as shares of the highest value."""
    scale = found.get("scale", 1.0)
    return found["value"] / scale, [end / scale for end in found["ci95"]] if found.get("ci95") else None


def _match_rows(report: Report, scores: Mapping[str, Figures], groups: Sequence[str]) -> list[list[Cell]]:
    rows = []
    for group in groups:
        cells = [found.get(group) for found in scores.values()]
        rows.append([Cell(group), count(next((c["n"] for c in cells if c), None)), *map(estimate, cells)])
    if any("held_out_kl" in report[who] for who in scores):
        kls = [plain(report[who].get("held_out_kl")) if who != "teacher" else Cell("0, itself", 0.0) for who in scores]
        rows.append([Cell("held-out KL, nats a token"), Cell(""), *kls])
    return rows


def benchmarks_section(report: Report) -> Section | None:
    """The benchmarks' headline figures, bars, a radar where there are three or more, and every other figure."""
    tasks = compared(report, probes=False)
    if not tasks:
        return None
    scored = [task for task in tasks if task.figures]
    tables = [_headlines(scored)] if scored else []
    tables += [_all_figures(task) for task in scored if len(task.figures) > 1]
    notes = [
        "Intervals are the central 95 % of a bootstrap; recovery is the student's figure as a share of the teacher's, "
        "both drawn anew with the same questions. Bars and radar show each figure as a share of its highest value."
    ]
    unscored = [task.name for task in tasks if not task.figures]
    if unscored:
        notes.append(f"Answered but not scored here, as the labels are not public: {', '.join(unscored)}.")
    return Section("benchmarks", "Benchmarks", _charts(scored), tables, notes)


def _charts(tasks: Sequence[Compared]) -> list[Chart]:
    bars = bar_chart(
        "Benchmarks: headline figures as a share of their highest value",
        [(f"{task.name}: {task.figures[0]}", _bars(task.models, task.figures[0])) for task in tasks],
        "share of the highest value",
        text=percent,
        top=1.0,
    )
    return [*([bars] if bars else []), *([_radar(tasks)] if len(tasks) >= CORNERS else [])]


def _radar(tasks: Sequence[Compared]) -> Chart:
    whos = tasks[0].models
    polygons = [(WHO[who], NAMES[who], [_corner(task, who) for task in tasks]) for who in whos]
    title = "Benchmarks, each axis from 0 to the figure's highest value"
    return radar_chart(title, [task.name for task in tasks], polygons, title)


def _corner(task: Compared, who: str) -> float:
    """A model that lacks a figure is drawn at the centre, and its table cell says so."""
    bars = _bars({who: task.models[who]}, task.figures[0])
    return bars[0].value if bars else 0.0


def _headlines(tasks: Sequence[Compared]) -> Table:
    rows = [[Cell(task.name), Cell(task.figures[0]), *task.cells(task.figures[0])] for task in tasks]
    return Table("Headline figures", ["benchmark", "figure", *tasks[0].head], rows, left=2)


def _all_figures(task: Compared) -> Table:
    rows = [[Cell(figure), *task.cells(figure)] for figure in task.figures]
    return Table(f"{task.name}: all {len(rows)} figures", ["figure", *task.head], rows, folded=True)
