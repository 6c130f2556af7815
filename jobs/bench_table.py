"""The table that ``decant bench`` prints: every point beside the teacher's and beside what the bytes allow."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jobs.figures import human_bytes, human_time

# Columns of a terminal that the table needs.
WIDTH = 124
Point = dict[str, Any]
# By model, engine, batch and context.
Points = dict[tuple[Any, ...], Point]


def show(result: dict[str, Any], out: Console) -> None:
    """Prints a table of all points and what it was measured with."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, width=WIDTH)
    for name in ("batch", "context", "model", "engine", "first", "tokens/s", "±", "roofline", "share"):
        table.add_column(name, justify="left" if name in ("model", "engine") else "right", no_wrap=True)
    for name in ("× teacher", "allowed", "peak", "formula"):
        table.add_column(name, justify="right", no_wrap=True)
    points = {_key(p): p for p in result["points"]}
    for place, rows in groupby(result["points"], lambda p: (p["batch"], p["context"])):
        table.add_section()
        for number, point in enumerate(rows):
            table.add_row(*(map(str, place) if number == 0 else ("", "")), *_cells(point, points))
    out.print(table)
    for line in _notes(result, points):
        out.print(line, markup=False)


def _key(point: Point, **other: Any) -> tuple[Any, ...]:
    return tuple((point | other)[name] for name in ("model", "engine", "batch", "context"))


def _cells(point: Point, points: Points) -> list[str]:
    teacher = points.get(_key(point, model="teacher"))
    speed, allowed = point["tokens_per_second"], point["roofline_tokens_per_second"]
    names = [point["model"], point["engine"]]
    if speed is None:
        return [*names, "", point["error"], "", f"{allowed:,.0f}", "", "", "", "", human_bytes(point["formula_bytes"])]
    least, most = point["tokens_per_second_range"]
    beside = teacher is not None and teacher is not point
    measured = teacher["tokens_per_second"] if beside and teacher else None
    return [
        *names,
        human_time(point["seconds_to_first_token"]),
        f"{speed:,.1f}",
        f"{50 * (most - least) / speed:.0f} %",
        f"{allowed:,.0f}",
        f"{100 * point['roofline_share']:.1f} %",
        f"{speed / measured:.2f}" if measured else "",
        f"{allowed / teacher['roofline_tokens_per_second']:.2f}" if beside and teacher else "",
        "" if point["peak_bytes"] is None else human_bytes(point["peak_bytes"]),
        human_bytes(point["formula_bytes"]),
    ]


def _notes(result: dict[str, Any], points: Points) -> Iterator[str]:
    settings, device = result["settings"], result["device"]
    low, high = result["bandwidth_range"]
    attention = result["models"]["teacher"]["attention"]
    yield (
        f"{device['name']}, {settings['dtype']}, attention {attention}; copies move "
        f"{human_bytes(result['bandwidth_bytes_per_second'])}/s ({human_bytes(low)} to {human_bytes(high)})"
    )
    yield (
        f"{settings['new_tokens']} new tokens, medians of {settings['repeats']}; tokens/s are of all but the first; "
        "± is half of most less least"
    )
    yield "first: time to the first token; allowed: the ratio of the rooflines, which no engine changes"
    for who, facts in result["models"].items():
        gains = _gains(who, points)
        gain = f"; the engine's gain over generate(): {min(gains):.2f} to {max(gains):.2f} ×" if gains else ""
        mixed = f", {len(facts['replaced'])} of {facts['layers']} layers Mamba-2 ({facts['backend']})"
        yield f"{who}: weights {facts['weights']}{mixed if facts['replaced'] else ''}{gain}"
    if any(p["peak_bytes"] is None and p["error"] is None for p in result["points"]):
        yield f"peak: {device['peak_bytes']}"


def _gains(who: str, points: Points) -> list[float]:
    """A model's rate by the engine over that of ``generate()``, wherever both were measured."""
    speeds = {key: point["tokens_per_second"] for key, point in points.items() if point["model"] == who}
    pairs = [(s, speeds.get((who, "generate", *key[2:]))) for key, s in speeds.items() if key[1] == "decant"]
    return [ours / other for ours, other in pairs if ours and other]
