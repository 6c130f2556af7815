"""What a page is made of: sections of tables, charts and sentences, and their cells; the template writes them as HTML.

Cells hold the figure beside its text, so that a page has every digit and not only those that people read.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline.report.svg import Style, swatch

UNITS = ("B", "kB", "MB", "GB", "TB")
NOTHING = "–"


@dataclass(frozen=True)
class Cell:
    """A cell: text, the figure that it tells, small print (an interval) after it; ``code`` is for names of things."""

    text: str
    value: float | None = None
    small: str = ""
    code: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells under ``head``; the first cell of a row names it. ``folded`` tables open at a touch."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    folded: bool = False
    left: int = 1  # columns of text, which are set to the left


@dataclass(frozen=True)
class Chart:
    """A drawing, what it shows, and its legend: the style, name and whether it is a bar."""

    svg: str
    caption: str
    legend: Sequence[tuple[Style, str, bool]] = ()

    def keys(self) -> list[tuple[str, str]]:
        """The legend's samples (SVG) and names."""
        return [(swatch(look, bar=bar), name) for look, name, bar in self.legend]


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading; ``notes`` stand under its charts and tables."""

    anchor: str
    title: str
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Page:
    """A whole page: ``lead`` says what it is about, ``tiles`` are its few main figures with what they are."""

    title: str
    lead: str
    tiles: Sequence[tuple[Cell, str]] = ()
    sections: Sequence[Section] = field(default=())

    def html(self) -> str:
        """The page as HTML that needs no other file, no network and no script."""
        loader = PackageLoader("pipeline.report", ".")
        found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
        return found.get_template("report.html.j2").render(page=self)


def finite(value: Any) -> bool:
    """Whether there is a figure to show."""
    return isinstance(value, int | float) and math.isfinite(value)


def share(value: float | None, ci95: Sequence[float] | None = None) -> Cell:
    """A proportion as a percentage."""
    if value is None or not finite(value):
        return Cell(NOTHING)
    small = f"{100 * ci95[0]:.1f}–{100 * ci95[1]:.1f}" if ci95 else ""
    return Cell(f"{100 * value:.1f} %", value, small)


def plain(value: float | None, ci95: Sequence[float] | None = None) -> Cell:
    """A figure with three digits, or all before the point."""
    if value is None or not finite(value):
        return Cell(NOTHING)
    return Cell(digits(value), value, f"{digits(ci95[0])}–{digits(ci95[1])}" if ci95 else "")


def digits(value: float) -> str:
    """A figure as people read it."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def estimate(found: Mapping[str, Any] | None) -> Cell:
    """A benchmark's figure: a percentage where 1 is the most that it can be, else in its own scale."""
    if not found or found.get("value") is None:
        return Cell(NOTHING)
    if found.get("scale", 1.0) == 1.0:
        return share(found["value"], found.get("ci95"))
    return plain(found["value"], found.get("ci95"))


def count(value: int | None) -> Cell:
    """A whole number."""
    return Cell(NOTHING) if value is None else Cell(f"{value:,}", value)


def size(value: float | None) -> Cell:
    """Bytes in a decimal unit, to three digits."""
    if value is None or not finite(value):
        return Cell(NOTHING)
    amount, unit = float(value), UNITS[0]
    for unit in UNITS:
        if abs(amount) < 999.5 or unit == UNITS[-1]:
            break
        amount /= 1000
    return Cell(f"{amount:.3g} {unit}" if amount < 999.5 else f"{amount:,.0f} {unit}", value)


def seconds(value: float | None) -> Cell:
    """A time in seconds, minutes or hours."""
    if value is None or not finite(value):
        return Cell(NOTHING)
    if value < 90:
        return Cell(f"{value:.1f} s" if value >= 1 else f"{1000 * value:.3g} ms", value)
    return Cell(f"{value / 60:.1f} min" if value < 5400 else f"{value / 3600:.1f} h", value)


def code(text: str) -> Cell:
    """The name of a thing."""
    return Cell(text, code=True)
