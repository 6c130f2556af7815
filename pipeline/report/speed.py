"""Pictures of what ``decant bench`` measured: speed and memory against the context, beside what bytes allow."""

from collections.abc import Callable
from typing import Any, Literal

from pipeline.report.charts import picture

Kind = Literal["png", "svg"]
Bench = dict[str, Any]
COLOURS = {"teacher": "#57606a", "student": "#0969da"}
MARKS = {"teacher": "o", "student": "s"}


def speed_chart(bench: Bench, kind: Kind) -> bytes:
    """Tokens a second of every model, a panel a batch: the engine solid, ``generate()`` dotted, rooflines dashed."""
    return _chart(bench, "tokens a second", kind, _speed_lines)


def memory_chart(bench: Bench, kind: Kind) -> bytes:
    """Gigabytes of every model, a panel a batch: measured peaks of the engine solid, the formula dashed."""
    return _chart(bench, "memory, GB", kind, _memory_lines)


def _speed_lines(axes: Any, who: str, points: list[dict[str, Any]]) -> None:
    for engine, style in (("decant", "-"), ("generate", ":")):
        mine = [p for p in points if p["engine"] == engine]
        _line(axes, f"{who}, {engine}", who, style, mine, "tokens_per_second")
    _line(axes, f"{who}, roofline", who, "--", _first_engine(points), "roofline_tokens_per_second")


def _memory_lines(axes: Any, who: str, points: list[dict[str, Any]]) -> None:
    _line(axes, f"{who}, peak", who, "-", [p for p in points if p["engine"] == "decant"], "peak_bytes", 1e9)
    _line(axes, f"{who}, formula", who, "--", _first_engine(points), "formula_bytes", 1e9)


def _first_engine(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One point a context: what does not depend on the engine is in the points of each."""
    return [p for p in points if p["engine"] == points[0]["engine"]]


def _line(
    axes: Any, label: str, who: str, style: str, points: list[dict[str, Any]], figure: str, unit: float = 1.0
) -> None:
    """A figure against the context; points without one (out of memory, not measured) are left out."""
    shown = [(p["context"], p[figure] / unit) for p in points if p[figure] is not None]
    if shown:
        mark, width = (None, 1.1) if style == "--" else (MARKS[who], 1.6)
        at, values = zip(*shown, strict=True)
        axes.plot(at, values, style, color=COLOURS[who], marker=mark, markersize=4, linewidth=width, label=label)


def _chart(bench: Bench, ylabel: str, kind: Kind, draw: Callable[[Any, str, list[dict[str, Any]]], None]) -> bytes:
    from matplotlib.figure import Figure

    batches = sorted({p["batch"] for p in bench["points"]})
    figure = Figure(figsize=(4.4 * len(batches), 3.6), layout="constrained")
    panels = figure.subplots(1, len(batches), squeeze=False)[0]
    for axes, batch in zip(panels, batches, strict=True):
        here = sorted((p for p in bench["points"] if p["batch"] == batch), key=lambda p: p["context"])
        for who in bench["models"]:
            draw(axes, who, [p for p in here if p["model"] == who])
        _frame(axes, f"batch {batch}", sorted({p["context"] for p in here}))
    panels[0].set_ylabel(ylabel)
    lines = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return picture(figure, kind)


def _frame(axes: Any, title: str, contexts: list[int]) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [context_label(c) for c in contexts])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("context, tokens")
    axes.spines[["top", "right"]].set_visible(False)


def context_label(context: int) -> str:
    """A context as people write it: 4096 is 4k."""
    return f"{context // 1024}k" if context % 1024 == 0 else str(context)
