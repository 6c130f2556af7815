"""SVG drawings for the page: shapes and text that take their colours from the page's style, light or dark.

A drawing is 360 units wide, the width of a phone, so that its text is as large there as the page's small print.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 360.0
# Units that a character takes at the most of the drawings' 11-unit text; letters of mixed words take about 5.6.
CHARACTER = 6.2

Point = tuple[float, float]


@dataclass(frozen=True)
class Style:
    """How a series looks: its colour's class in the style sheet, its marker and its dashes; none by colour alone."""

    name: str
    shape: str = "circle"
    dash: str = ""

    def dashed(self) -> "Style":
        """The same colour for what was computed and not measured."""
        return Style(self.name, "", "5 3")


SHAPES = ("circle", "square", "triangle", "diamond", "cross")
# Corners of the markers, in units of the radius.
CORNERS: dict[str, Sequence[Point]] = {
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "triangle": ((0, -1.2), (1.1, 0.8), (-1.1, 0.8)),
    "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
}
WHO = {
    "teacher": Style("teacher", "square"),
    "student": Style("student", "circle"),
    "student_untrained": Style("untrained", "triangle"),
}
NAMES = {"teacher": "teacher", "student": "distilled student", "student_untrained": "untrained student"}
# Colours that the style sheet has besides; eight lines are as many as can be told apart.
COLOURS = 8


def style(number: int) -> Style:
    """The style of the series with this number; colour and marker repeat at different numbers."""
    dashes = ("", "6 2", "2 2")
    return Style(f"c{number % COLOURS}", SHAPES[number % len(SHAPES)], dashes[number // COLOURS % len(dashes)])


def number(value: float) -> str:
    """A coordinate, to a hundredth of a unit."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if "." in f"{value:.2f}" else f"{value:.0f}"


def shortened(text: str, room: float) -> str:
    """As much of the text as the room (in units) holds."""
    count = max(1, int(room / CHARACTER))
    return text if len(text) <= count else text[: max(1, count - 1)].rstrip() + "…"


class Drawing:
    """One drawing of a given height; what it shows is told by its title to those who cannot see it."""

    def __init__(self, title: str, height: float, width: float = WIDTH) -> None:
        self.title, self.height, self.width = title, height, width
        self.parts: list[str] = []

    def line(self, start: Point, end: Point, kind: str = "grid") -> None:
        """A straight line; ``kind`` is its classes."""
        (x1, y1), (x2, y2) = ([number(v) for v in point] for point in (start, end))
        self.parts.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" class="{kind}"/>')

    def rect(self, corner: Point, size: Point, kind: str, tip: str = "", opacity: float | None = None) -> None:
        """A rectangle from its upper left corner."""
        (x, y), (w, h) = ([number(v) for v in point] for point in (corner, size))
        faint = "" if opacity is None else f' fill-opacity="{number(opacity)}"'
        said = f">{_tip(tip)}</rect>" if tip else "/>"
        self.parts.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" class="{kind}"{faint}{said}')

    def text(self, at: Point, text: str, anchor: str = "start", kind: str = "", room: float | None = None) -> None:
        """A line of text, cut to ``room`` with the whole as its tip."""
        shown = text if room is None else shortened(text, room)
        tip = _tip(text) if shown != text else ""
        x, y = (number(v) for v in at)
        classes = f' class="{kind}"' if kind else ""
        place = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self.parts.append(f'<text x="{x}" y="{y}"{place}{classes}>{tip}{escape(shown)}</text>')

    def path(self, points: Sequence[Point], look: Style, *, closed: bool = False) -> None:
        """A line through points in the look's colour; filled faintly if closed."""
        places = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        dash = f' stroke-dasharray="{look.dash}"' if look.dash else ""
        tag, kind = ("polygon", "area") if closed else ("polyline", "curve")
        self.parts.append(f'<{tag} points="{places}" class="{kind} {look.name}"{dash}/>')

    def marker(self, at: Point, look: Style, tip: str = "", radius: float = 3.2, kind: str = "mark") -> None:
        """The look's marker; nothing where it has none."""
        x, y = at
        if look.shape in CORNERS:
            places = " ".join(f"{number(x + radius * a)},{number(y + radius * b)}" for a, b in CORNERS[look.shape])
            self.parts.append(f'<polygon points="{places}" class="{kind} {look.name}">{_tip(tip)}</polygon>')
        elif look.shape == "cross":
            a, b, c, d = (number(v) for v in (x - radius, y - radius, x + radius, y + radius))
            self.parts.append(
                f'<path d="M{a} {b}L{c} {d}M{a} {d}L{c} {b}" class="curve {look.name}">{_tip(tip)}</path>'
            )
        elif look.shape:
            place = f'cx="{number(x)}" cy="{number(y)}" r="{number(radius)}"'
            self.parts.append(f'<circle {place} class="{kind} {look.name}">{_tip(tip)}</circle>')

    def svg(self) -> str:
        """The drawing as an element of a page."""
        title = escape(self.title, quote=True)
        box = f"0 0 {number(self.width)} {number(self.height)}"
        return f'<svg viewBox="{box}" role="img" aria-label="{title}">{"".join(self.parts)}</svg>'


def _tip(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def swatch(look: Style, *, bar: bool = False) -> str:
    """The sample of a style beside its name in a legend."""
    drawing = Drawing("", 12, 26)
    if bar:
        drawing.rect((2, 2), (22, 8), f"bar {look.name}")
    else:
        drawing.path([(1, 6), (25, 6)], look)
        drawing.marker((13, 6), look)
    return drawing.svg().replace('role="img" aria-label=""', 'class="key" aria-hidden="true"')
