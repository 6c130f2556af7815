"""Charts of other shapes: the radar over benchmarks, and the table of shades over two settings."""

import math
from collections.abc import Sequence

from pipeline.report.blocks import Chart, finite
from pipeline.report.svg import CHARACTER, WIDTH, Drawing, Point, Style

# The radar's circle; beside it stays room for 15 characters of a name.
CENTRE, RADIUS = (WIDTH / 2, 112.0), 84.0
RINGS = (0.25, 0.5, 0.75, 1.0)
# The deepest shade: text in the page's ink stays readable on it, light and dark.
DEEPEST = 0.45


def radar_chart(
    title: str, names: Sequence[str], polygons: Sequence[tuple[Style, str, Sequence[float]]], caption: str
) -> Chart:
    """A polygon for each model over axes of 0 to 1; names stand around."""
    drawing = Drawing(title, CENTRE[1] + RADIUS + 22)
    for ring in RINGS:
        drawing.path([_place(i, len(names), ring) for i in range(len(names))], Style("ring"), closed=True)
    for number, name in enumerate(names):
        _spoke(drawing, number, len(names), name)
    for look, who, values in polygons:
        places = [_place(i, len(names), v) for i, v in enumerate(values)]
        drawing.path(places, look, closed=True)
        for place, name, value in zip(places, names, values, strict=True):
            drawing.marker(place, look, f"{who}, {name}: {100 * value:.1f} %")
    return Chart(drawing.svg(), caption, [(look, who, False) for look, who, _ in polygons])


def _place(number: int, of: int, value: float) -> Point:
    angle = 2 * math.pi * number / of - math.pi / 2
    reach = RADIUS * min(max(value, 0.0), 1.0)
    return CENTRE[0] + reach * math.cos(angle), CENTRE[1] + reach * math.sin(angle)


def _spoke(drawing: Drawing, number: int, of: int, name: str) -> None:
    end = _place(number, of, 1.0)
    drawing.line(CENTRE, end)
    out_x, out_y = (end[0] - CENTRE[0]) / RADIUS, (end[1] - CENTRE[1]) / RADIUS
    at = (end[0] + 8 * out_x, end[1] + 12 * out_y + 4)
    sideways = abs(out_x) > 0.15
    anchor = "middle" if not sideways else "start" if out_x > 0 else "end"
    room = (WIDTH - at[0] if out_x > 0 else at[0]) - 2 if sideways else 2 * min(at[0], WIDTH - at[0])
    drawing.text(at, name, anchor, room=room)


def heat_chart(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    look: Style,
    axes: tuple[str, str],
    caption: str = "",
) -> Chart:
    """Proportions over two settings: shades from 0 to 1 with the percentage in each; ``axes`` name rows and columns."""
    left = max(44.0, CHARACTER * max(len(row) for row in rows) + 8)
    wide, high, top = (WIDTH - 6 - left) / len(columns), 22.0, 34.0
    drawing = Drawing(title, top + high * len(rows) + 6)
    drawing.text((2, 12), f"{axes[0]} ↓", kind="label")
    drawing.text((WIDTH - 6, 12), f"{axes[1]} →", "end", "label")
    for number, name in enumerate(columns):
        drawing.text((left + wide * (number + 0.5), top - 6), name, "middle", "figure", room=wide)
    for line, (name, row) in enumerate(zip(rows, values, strict=True)):
        y = top + high * line
        drawing.text((left - 4, y + 15), name, "end", "figure")
        for number, value in enumerate(row):
            _shade(drawing, (left + wide * number, y), (wide, high), value, look, f"{name}, {columns[number]}")
    return Chart(drawing.svg(), caption or title)


def _shade(drawing: Drawing, at: Point, size: Point, value: float | None, look: Style, where: str) -> None:
    middle = (at[0] + size[0] / 2, at[1] + 15)
    if value is None or not finite(value):
        drawing.text(middle, "–", "middle", "figure")
        return
    inside = (size[0] - 1.5, size[1] - 1.5)
    drawing.rect(at, inside, f"shade {look.name}", f"{where}: {100 * value:.1f} %", opacity=DEEPEST * value)
    drawing.text(middle, f"{100 * value:.0f}", "middle", "value")
