"""The section of probes: accuracy against length, and depth by length where a needle's depth is told."""

from collections.abc import Sequence

from pipeline.report.blocks import Cell, Chart, Section, Table
from pipeline.report.grids import heat_chart
from pipeline.report.plots import Axes, Series, line_chart
from pipeline.report.scales import percent, powers_of_two
from pipeline.report.svg import NAMES, WHO
from pipeline.report.tasks import Compared, Figures, Report, compared, parsed

# Rows of a table that opens at a touch: fewer are read as they stand.
FOLDED = 8


def probes_section(report: Report) -> Section | None:
    """Every probe's accuracy against length, heat maps of needles, and all figures."""
    tasks = compared(report, probes=True)
    if not tasks:
        return None
    charts = [chart for task in tasks for chart in _curves(task) + _needles(task)]
    note = "Probes are generated from a seed; length is the prompt's, in the model's own tokens."
    return Section("probes", "Probes where hybrids fail", charts, [_table(task) for task in tasks], [note])


def _names(task: Compared) -> list[str]:
    """The figures that are known by length."""
    return list(dict.fromkeys(found[0] for figure in task.figures if (found := parsed(figure))))


def _points(figures: Figures, name: str) -> list[tuple[int, float | None, float]]:
    """Length, depth and value of the figures that have one name."""
    known = [(parsed(figure), its["value"]) for figure, its in figures.items() if its["value"] is not None]
    return [(found[1], found[2], value) for found, value in known if found and found[0] == name]


def _curves(task: Compared) -> list[Chart]:
    charts = []
    for name in _names(task):
        series = [Series(WHO[who], by_length(_points(its, name)), NAMES[who]) for who, its in task.models.items()]
        ticks = sorted({x for s in series for x, _ in s.points})
        axes = Axes(
            "prompt length, tokens", name, True, zero_y=True, ticks_x=ticks, text_x=powers_of_two, text_y=percent
        )
        charts.append(line_chart(f"{task.name}: {name} against length", axes, series))
    return [chart for chart in charts if chart]


def by_length(points: Sequence[tuple[int, float | None, float]]) -> list[tuple[float, float]]:
    """One point a length: the figure over all depths, or where that is not there the mean of the depths'."""
    found = []
    for length in sorted({at for at, _, _ in points}):
        whole = [value for at, depth, value in points if at == length and depth is None]
        parts = whole or [value for at, _, value in points if at == length]
        found.append((float(length), sum(parts) / len(parts)))
    return found


def _needles(task: Compared) -> list[Chart]:
    charts = []
    for name in _names(task):
        for who, figures in task.models.items():
            cells = {(depth, length): v for length, depth, v in _points(figures, name) if depth is not None}
            if cells:
                charts.append(_heat(f"{task.name}, {NAMES[who]}: {name}, per cent", cells, who))
    return charts


def _heat(title: str, cells: dict[tuple[float, int], float], who: str) -> Chart:
    depths, lengths = sorted({depth for depth, _ in cells}), sorted({length for _, length in cells})
    values = [[cells.get((depth, length)) for length in lengths] for depth in depths]
    names = [percent(depth) for depth in depths], [powers_of_two(length) for length in lengths]
    return heat_chart(title, *names, values, WHO[who], ("depth", "length"))


def _table(task: Compared) -> Table:
    rows = [[Cell(figure), *task.cells(figure)] for figure in task.figures]
    return Table(f"{task.name}: all figures", ["figure", *task.head], rows, folded=len(rows) > FOLDED)
