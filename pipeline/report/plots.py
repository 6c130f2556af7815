"""Charts over axes: lines against steps or context, and the reliability diagram."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pipeline.report.blocks import Chart
from pipeline.report.scales import Scale, brief, spanning
from pipeline.report.svg import CHARACTER, WIDTH, Drawing, Point, Style

TOP, LEFT, RIGHT, BOTTOM = 20.0, 42.0, 350.0, 200.0
# Points of a line beyond which no pixel of it changes.
MOST = 240
# Points that are few enough to be marked, each; of more, every so many, so that lines differ by more than colour.
MARKED, SPARSE = 24, 8


@dataclass(frozen=True)
class Series:
    """One line: its look, points, and name in the legend (None: it has no entry)."""

    look: Style
    points: Sequence[Point]
    name: str | None = None


@dataclass(frozen=True)
class Axes:
    """What the axes say: their labels, whether they are logarithmic or begin at 0, and what is labelled on x."""

    x: str
    y: str
    log_x: bool = False
    log_y: bool = False
    zero_y: bool = False
    ticks_x: Sequence[float] = ()
    text_x: Callable[[float], str] = field(default=brief)
    text_y: Callable[[float], str] = field(default=brief)


def line_chart(
    title: str, axes: Axes, series: Sequence[Series], rules: Sequence[float] = (), caption: str = ""
) -> Chart | None:
    """Lines, None where there is no point to draw; ``rules`` are vertical lines at values of x.

    On a logarithmic axis what is not above 0 is left out.
    """
    shown = [Series(s.look, _drawable(s.points, axes), s.name) for s in series]
    shown = [s for s in shown if s.points]
    across = spanning((x for s in shown for x, _ in s.points), LEFT, RIGHT, log=axes.log_x)
    up = spanning((y for s in shown for _, y in s.points), BOTTOM, TOP, log=axes.log_y, zero=axes.zero_y)
    if across is None or up is None:
        return None
    drawing = Drawing(title, BOTTOM + 36)
    frame(drawing, axes, across, up)
    for x in rules:
        drawing.line((across(x), TOP), (across(x), BOTTOM), "rule")
    for s in shown:
        draw_line(drawing, s, across, up, axes)
    return Chart(drawing.svg(), caption or title, [(s.look, s.name, False) for s in shown if s.name])


def _drawable(points: Sequence[Point], axes: Axes) -> list[Point]:
    kept = [(x, y) for x, y in points if (x > 0 or not axes.log_x) and (y > 0 or not axes.log_y)]
    return thinned(kept)


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most ``MOST`` of the points, evenly, with the last."""
    if len(points) <= MOST:
        return list(points)
    stride = -(-len(points) // MOST)
    return [p for i, p in enumerate(points) if i % stride == 0 or i == len(points) - 1]


def draw_line(drawing: Drawing, series: Series, across: Scale, up: Scale, axes: Axes) -> None:
    """One line, with markers that tell their values."""
    places = [(across(x), up(y)) for x, y in series.points]
    if len(places) > 1:
        drawing.path(places, series.look)
    stride = 1 if len(places) <= MARKED else -(-len(places) // SPARSE)
    for place, (x, y) in list(zip(places, series.points, strict=True))[::stride]:
        tip = f"{series.name or ''} {axes.text_x(x)}: {axes.text_y(y)}".strip()
        drawing.marker(place, series.look, tip)


def frame(drawing: Drawing, axes: Axes, across: Scale, up: Scale) -> None:
    """Grid, figures on both axes, and what they count."""
    for y in up.ticks():
        drawing.line((LEFT, up(y)), (RIGHT, up(y)))
        drawing.text((LEFT - 4, up(y) + 3.5), axes.text_y(y), "end", "figure")
    drawing.line((LEFT, BOTTOM), (RIGHT, BOTTOM), "axis")
    last = -WIDTH
    for x in axes.ticks_x or across.ticks():
        label, at = axes.text_x(x), across(x)
        # labels that would run into each other are left out
        if at - last >= CHARACTER * len(label) + 4:
            drawing.line((at, BOTTOM), (at, BOTTOM + 3), "axis")
            drawing.text((at, BOTTOM + 14), label, "middle", "figure")
            last = at
    drawing.text((2, 10), axes.y, kind="label", room=WIDTH - 4)
    drawing.text((RIGHT, BOTTOM + 29), axes.x, "end", "label", room=RIGHT - LEFT)


def reliability_chart(title: str, bins: Sequence[tuple[float, float, float]], look: Style) -> Chart | None:
    """Accuracy against confidence (Guo et al. 2017): bins of (confidence, accuracy, share); area says the share."""
    if not bins:
        return None
    across, up = Scale(0, 1, LEFT, RIGHT), Scale(0, 1, BOTTOM, TOP)
    drawing = Drawing(title, BOTTOM + 36)
    frame(drawing, Axes("confidence in the first choice", "share of them right"), across, up)
    drawing.line((across(0), up(0)), (across(1), up(1)), "ideal")
    most = max(weight for _, _, weight in bins) or 1.0
    for confidence, right, weight in bins:
        tip = f"confidence {confidence:.3f}: {100 * right:.1f} % right, {100 * weight:.1f} % of the tokens"
        place = (across(confidence), up(right))
        drawing.line(place, (place[0], up(confidence)), f"whisker {look.name}")
        drawing.marker(place, look, tip, radius=2.2 + 6 * (weight / most) ** 0.5, kind="bubble")
    return Chart(drawing.svg(), title)
