"""Histograms as a picture file, drawn by matplotlib; the report draws its charts itself (``svg.py``)."""

import io
from collections.abc import Sequence
from typing import Any, Literal

from pipeline.histograms import Histogram

TITLE, BAR, MEDIAN = "#57606a", "#0969da", "#d4a72c"

# Counts further apart than this cannot be seen side by side on a linear axis.
LINEAR = 100


def _figure(width: float, height: float, rows: int, columns: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(grid.flat)


def picture(figure: Any, kind: Literal["png", "svg"]) -> bytes:
    """The figure as a file's bytes, the same for the same figure."""
    import matplotlib
    from matplotlib import pyplot

    sink = io.BytesIO()
    # a fixed salt, no date and no version: the same figures give the same picture
    with matplotlib.rc_context({"svg.hashsalt": "decant"}):
        figure.savefig(sink, format=kind, dpi=150, metadata={"Date" if kind == "svg" else "Software": None})
    pyplot.close(figure)
    return sink.getvalue()


def histogram_chart(title: str, histograms: Sequence[Histogram], kind: Literal["png", "svg"]) -> bytes:
    """A picture file of histograms, two beside each other."""
    rows = -(-len(histograms) // 2)
    figure, grid = _figure(9.0, 0.4 + 2.6 * rows, rows, 2)
    figure.suptitle(title, fontsize=10, color=TITLE)
    for axes, shown in zip(grid, histograms, strict=False):
        # bars of whole numbers stand over the numbers, others between their edges
        shift = 0.5 if shown.whole else 0.0
        left = [edge - shift for edge in shown.edges[:-1]]
        widths = [b - a for a, b in zip(shown.edges, shown.edges[1:], strict=False)]
        axes.bar(left, shown.counts, widths, align="edge", color=BAR, edgecolor="white", linewidth=0.6)
        axes.axvline(shown.median, color=MEDIAN, linewidth=1.4, label=f"median {shown.median:.4g}")
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
    return picture(figure, kind)
