"""Charts of rows: grouped bars with intervals, and dots of several seeds with their mean."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.report.blocks import Chart
from pipeline.report.scales import Scale, brief, spanning
from pipeline.report.svg import CHARACTER, WIDTH, Drawing, Point, Style

LEFT, RIGHT = 8.0, 350.0
LABEL, BAR, GAP, FOOT = 15.0, 9.0, 9.0, 30.0


@dataclass(frozen=True)
class Bar:
    """One bar: its look, whose it is, its length and its interval's ends."""

    look: Style
    name: str
    value: float
    ci95: Sequence[float] | None = None


@dataclass(frozen=True)
class Dots:
    """One row of dots: the name, each one's value with what to say of it, their mean and its interval."""

    name: str
    points: Sequence[tuple[float, str]]
    mean: float | None = None
    ci95: Sequence[float] | None = None


def bar_chart(
    title: str,
    groups: Sequence[tuple[str, Sequence[Bar]]],
    unit: str,
    *,
    text: Callable[[float], str] = brief,
    top: float | None = None,
    log: bool = False,
    caption: str = "",
) -> Chart | None:
    """Groups of horizontal bars, one below the other, each under its name; None where there are none.

    ``top`` is the axis's end where that is known.
    """
    groups = [(name, bars) for name, bars in groups if bars]
    across = _bars_scale([bar for _, bars in groups for bar in bars], top, log=log)
    if across is None:
        return None
    height = sum(LABEL + BAR * len(bars) + GAP for _, bars in groups)
    drawing = Drawing(title, height + FOOT)
    _axis(drawing, across, height, unit, text)
    y = 0.0
    for name, bars in groups:
        drawing.text((LEFT, y + LABEL - 4), name, room=RIGHT - LEFT)
        for number, bar in enumerate(bars):
            _bar(drawing, bar, across, y + LABEL + BAR * number, text)
        y += LABEL + BAR * len(bars) + GAP
    legend = {bar.name: (bar.look, bar.name, True) for _, bars in groups for bar in bars if bar.name}
    return Chart(drawing.svg(), caption or title, list(legend.values()))


def _bars_scale(bars: Sequence[Bar], top: float | None, *, log: bool) -> Scale | None:
    values = [v for bar in bars for v in (bar.value, *(bar.ci95 or ()))]
    if not bars:
        return None
    if top is not None:
        return Scale(0.0, top, LEFT, RIGHT)
    found = spanning(values, LEFT, RIGHT, log=log, zero=not log)
    # a logarithmic bar has no natural beginning: a decade before the shortest, so that this one is seen
    return Scale(found.low / 10, found.high, LEFT, RIGHT, log=True) if found and log else found


def _axis(drawing: Drawing, across: Scale, height: float, unit: str, text: Callable[[float], str]) -> None:
    last = -WIDTH
    for x in across.ticks():
        at, label = across(x), text(x)
        drawing.line((at, 0), (at, height))
        if at - last >= CHARACTER * len(label) + 4:
            anchor = "start" if at < LEFT + 8 else "end" if at > RIGHT - 12 else "middle"
            drawing.text((at, height + 11), label, anchor, "figure")
            last = at
    drawing.text((RIGHT, height + 25), unit, "end", "label", room=RIGHT - LEFT)


def _bar(drawing: Drawing, bar: Bar, across: Scale, y: float, text: Callable[[float], str]) -> None:
    start = across(0.0) if not across.log else across.start
    ends = sorted((start, across(bar.value)))
    interval = f" ({text(bar.ci95[0])} to {text(bar.ci95[1])})" if bar.ci95 else ""
    tip = f"{bar.name} {text(bar.value)}{interval}".strip()
    drawing.rect((ends[0], y), (max(ends[1] - ends[0], 0.6), BAR - 1.5), f"bar {bar.look.name}", tip)
    if bar.ci95:
        whisker(drawing, across, bar.ci95, y + (BAR - 1.5) / 2)


def whisker(drawing: Drawing, across: Scale, ends: Sequence[float], y: float, kind: str = "whisker") -> None:
    """An interval as a line with short ends."""
    low, high = across(ends[0]), across(ends[1])
    drawing.line((low, y), (high, y), kind)
    for x in (low, high):
        drawing.line((x, y - 2.5), (x, y + 2.5), kind)


def dot_chart(
    title: str, rows: Sequence[Dots], unit: str, look: Style, text: Callable[[float], str] = brief, caption: str = ""
) -> Chart | None:
    """One row a name: a dot for each value, a bar for the mean and a line for its interval; None without values."""
    rows = [row for row in rows if row.points or row.mean is not None]
    across = spanning((v for row in rows for v in _values(row)), LEFT, RIGHT)
    if across is None:
        return None
    pitch = LABEL + 16.0
    drawing = Drawing(title, pitch * len(rows) + FOOT)
    _axis(drawing, across, pitch * len(rows), unit, text)
    for number, row in enumerate(rows):
        _dots(drawing, row, across, pitch * number, look, text)
    return Chart(drawing.svg(), caption or title)


def _values(row: Dots) -> list[float]:
    """What the axis has to hold: an interval of two seeds can be wider than anything seen, and is cut."""
    seen = [value for value, _ in row.points]
    return seen if row.mean is None else [*seen, row.mean]


def _dots(drawing: Drawing, row: Dots, across: Scale, y: float, look: Style, text: Callable[[float], str]) -> None:
    drawing.text((LEFT, y + LABEL - 4), row.name, room=RIGHT - LEFT)
    middle = y + LABEL + 6
    if row.ci95:
        whisker(drawing, across, row.ci95, middle)
    if row.mean is not None:
        at = across(row.mean)
        drawing.rect((at - 1.2, middle - 6), (2.4, 12), f"bar {look.name}", f"mean {text(row.mean)}")
    for number, (value, said) in enumerate(row.points):
        # seeds whose values are the same stay apart
        place: Point = (across(value), middle + (number % 3 - 1) * 3.2)
        drawing.marker(place, look, f"{said}: {text(value)}", radius=3.0, kind="hollow")
