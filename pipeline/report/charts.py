"""Charts drawn by matplotlib: the report's as SVG text, and histograms as a picture file."""

import io
from collections.abc import Sequence
from typing import Any, Literal

from pipeline.histograms import Histogram

INK, TEACHER, STUDENT, UNTRAINED = "#24292f", "#57606a", "#0969da", "#d4a72c"
COLOURS = {"teacher": TEACHER, "student": STUDENT, "student_untrained": UNTRAINED}
LABELS = {"teacher": "teacher", "student": "distilled student", "student_untrained": "untrained student"}

# Counts further apart than this cannot be seen side by side on a linear axis.
LINEAR = 100


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid[0, 0] if grid.size == 1 else list(grid.flat)


def _picture(figure: Any, kind: Literal["png", "svg"]) -> bytes:
    import matplotlib
    from matplotlib import pyplot

    sink = io.BytesIO()
    # a fixed salt, no date and no version: the same figures give the same picture
    with matplotlib.rc_context({"svg.hashsalt": "decant"}):
        figure.savefig(sink, format=kind, dpi=150, metadata={"Date" if kind == "svg" else "Software": None})
    pyplot.close(figure)
    return sink.getvalue()


def _svg(figure: Any) -> str:
    """The picture to stand in a page, without the file's head."""
    text = _picture(figure, "svg").decode()
    return text[text.index("<svg") :]


def exact_match_chart(scores: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Bars of exact match per group with 95 % intervals; ``scores`` maps who to group to a proportion."""
    figure, axes = _figure(9.0, 3.4)
    groups = list(next(iter(scores.values())))
    width = 0.8 / len(scores)
    for number, (who, by_group) in enumerate(scores.items()):
        places = [i + (number - (len(scores) - 1) / 2) * width for i in range(len(groups))]
        values = [by_group[g]["value"] for g in groups]
        low = [v - by_group[g]["ci95"][0] for g, v in zip(groups, values, strict=True)]
        high = [by_group[g]["ci95"][1] - v for g, v in zip(groups, values, strict=True)]
        axes.bar(places, values, width * 0.92, color=COLOURS[who], label=LABELS[who])
        axes.errorbar(places, values, [low, high], fmt="none", ecolor=INK, elinewidth=0.8, capsize=2)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("exact match")
    figure.legend(loc="outside upper center", ncols=len(scores), frameon=False)
    return _svg(figure)


def curve_chart(history: Sequence[dict[str, Any]], names: Sequence[str], ylabel: str) -> str:
    """Logged losses over all phases' steps, logarithmic; a rule where a phase begins."""
    figure, axes = _figure(4.6, 3.0)
    offsets, total = {}, 0
    for entry in history:
        if entry["phase"] not in offsets:
            offsets[entry["phase"]] = total
            total += entry["steps"]
    for name in names:
        # a step whose batch holds no taps logs a layer loss of 0, which is no measurement
        points = [(offsets[e["phase"]] + e["step"], e[name]) for e in history if e.get(name, 0) > 0]
        if points:
            label = name.replace("_", " ").replace("kl", "KL")
            axes.plot([x for x, _ in points], [y for _, y in points], label=label, linewidth=1.4)
    for start in list(offsets.values())[1:]:
        axes.axvline(start, color="#d0d7de", linewidth=1)
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def bar_chart(values: dict[str, float], label: str, unit: str, *, log: bool = False) -> str:
    """Horizontal bars, the first on top, each with its figure."""
    figure, axes = _figure(4.6, 0.6 + 0.4 * len(values))
    names = list(values)[::-1]
    bars = axes.barh(names, [values[n] for n in names], color=STUDENT, height=0.6)
    axes.bar_label(bars, fmt=f"%.0f {unit}", padding=3, fontsize=8)
    if log:
        axes.set_xscale("log")
    axes.set_xlim(1 if log else 0, max(values.values()) * (6 if log else 1.15))  # room for the figures
    axes.set_xlabel(label)
    return _svg(figure)


def histogram_chart(title: str, histograms: Sequence[Histogram], kind: Literal["png", "svg"]) -> bytes:
    """A picture file of histograms, two beside each other."""
    rows = -(-len(histograms) // 2)
    figure, grid = _figure(9.0, 0.4 + 2.6 * rows, rows, 2)
    figure.suptitle(title, fontsize=10, color=TEACHER)
    for axes, shown in zip(grid, histograms, strict=False):
        # bars of whole numbers stand over the numbers, others between their edges
        shift = 0.5 if shown.whole else 0.0
        left = [edge - shift for edge in shown.edges[:-1]]
        widths = [b - a for a, b in zip(shown.edges, shown.edges[1:], strict=False)]
        axes.bar(left, shown.counts, widths, align="edge", color=STUDENT, edgecolor="white", linewidth=0.6)
        axes.axvline(shown.median, color=UNTRAINED, linewidth=1.4, label=f"median {shown.median:.4g}")
        axes.set_xlabel(shown.title)
        axes.locator_params(axis="x", integer=shown.whole, nbins=8)
        logarithmic = max(shown.counts) > LINEAR * min(c for c in shown.counts if c)
        axes.set_ylabel("count, logarithmic" if logarithmic else "count")
        if logarithmic:
            axes.set_yscale("log")
            axes.set_ylim(bottom=0.5)  # a count of 1 has a height
        axes.legend(frameon=False, fontsize=8)
    for axes in grid[len(histograms) :]:
        axes.remove()
    return _picture(figure, kind)
