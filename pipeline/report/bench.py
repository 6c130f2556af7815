"""The section of speed: tokens a second, first token and memory of teacher and student beside their rooflines."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.report.blocks import Cell, Chart, Section, Table, count, finite, plain, seconds, share, size
from pipeline.report.plots import Axes, Series, line_chart
from pipeline.report.scales import brief, powers_of_two
from pipeline.report.svg import NAMES, WHO, Style, style

# The student's gain is taken in this engine alone: the other one's differs between the two models' caches.
OURS, GENERATE = "decant", "generate"
Points = Sequence[Mapping[str, Any]]


def bench_section(bench: Mapping[str, Any] | None) -> Section | None:
    """Curves by batch, the student's gain, transformers' own engine beside ours, and every point."""
    points: Points = bench["points"] if bench else []
    if not points or bench is None:
        return None
    batches = sorted({p["batch"] for p in points})
    charts = [chart for batch in batches for chart in _charts(_of(points, OURS, batch), batch)]
    tables = [_gains(points), _engines(points), _all_points(points), *_models(bench)]
    notes = [
        "Teacher and student generate by one and the same engine; dashed lines are the roofline, the bytes read a step "
        "over the device's measured bandwidth, and the memory formula. " + _device(bench),
        "The engine's gain is its tokens a second over those of transformers' `generate()` for the same model, "
        "and never part of the student's gain.",
    ]
    return Section("speed", "Speed and memory", charts, [t for t in tables if t.rows], notes)


def _of(points: Points, engine: str, batch: int) -> Points:
    found = [p for p in points if p["engine"] == engine and p["batch"] == batch]
    return sorted(found, key=lambda p: p["context"])


def _charts(points: Points, batch: int) -> list[Chart]:
    def gigabytes(value: float) -> str:
        return size(value).text

    shown: list[tuple[str, str, str | None, Callable[[float], str]]] = [
        ("tokens a second", "tokens_per_second", "roofline_tokens_per_second", brief),
        ("peak memory", "peak_bytes", "formula_bytes", gigabytes),
        ("time to the first token", "seconds_to_first_token", None, lambda v: seconds(v).text),
    ]
    charts = []
    for label, measured, computed, text in shown:
        ticks = sorted({p["context"] for p in points})
        axes = Axes("context, tokens", label, True, True, ticks_x=ticks, text_x=powers_of_two, text_y=text)
        series = _measured(points, measured) + (_computed(points, computed) if computed else [])
        charts.append(line_chart(f"{label[0].upper()}{label[1:]} against context, batch {batch}", axes, series))
    return [chart for chart in charts if chart]


def _line(points: Points, who: str, key: str) -> list[tuple[float, float]]:
    return [(float(p["context"]), p[key]) for p in points if p["model"] == who and finite(p.get(key))]


def _models_of(points: Points) -> dict[str, Style]:
    """The models that were measured, and how each is drawn."""
    return {who: WHO.get(who, style(i)) for i, who in enumerate(dict.fromkeys(p["model"] for p in points))}


def _measured(points: Points, key: str) -> list[Series]:
    return [Series(look, _line(points, who, key), NAMES.get(who, who)) for who, look in _models_of(points).items()]


def _computed(points: Points, key: str) -> list[Series]:
    name = "roofline" if key.startswith("roofline") else "formula"
    models = _models_of(points).items()
    return [Series(look.dashed(), _line(points, who, key), f"{NAMES.get(who, who)}, {name}") for who, look in models]


def _ratio(above: Mapping[str, Any] | None, below: Mapping[str, Any] | None, key: str) -> Cell:
    values = [p.get(key) if p else None for p in (above, below)]
    if values[0] is None or not values[1]:
        return Cell("–")
    return Cell(f"{values[0] / values[1]:.2f} ×", values[0] / values[1])


def _index(points: Points) -> dict[tuple[str, str, int, int], Mapping[str, Any]]:
    return {(p["model"], p["engine"], p["batch"], p["context"]): p for p in points}


def _gains(points: Points) -> Table:
    """The student over the teacher by our engine: measured, and what their rooflines allow."""
    known, rows = _index(points), []
    for batch, context in sorted({(p["batch"], p["context"]) for p in points if p["engine"] == OURS}):
        teacher, student = (known.get((who, OURS, batch, context)) for who in ("teacher", "student"))
        keys = ("tokens_per_second", "roofline_tokens_per_second")
        ratios = [_ratio(student, teacher, key) for key in keys]
        memory = _ratio(student, teacher, "peak_bytes")
        if any(cell.value is not None for cell in (*ratios, memory)):
            rows.append([count(batch), count(context), *ratios, memory])
    head = ["batch", "context", "tokens a second", "roofline's", "peak memory"]
    return Table("Student over teacher, same engine", head, rows)


def _engines(points: Points) -> Table:
    """Our engine over ``generate()``, model by model."""
    known, rows = _index(points), []
    for who, engine, batch, context in sorted(known, key=lambda k: (k[0] != "teacher", *k[1:])):
        other = known.get((who, OURS, batch, context))
        if engine == GENERATE and other is not None:
            ratio = _ratio(other, known[who, engine, batch, context], "tokens_per_second")
            rows.append([Cell(NAMES.get(who, who)), count(batch), count(context), ratio])
    return Table("The engine's gain over generate()", ["model", "batch", "context", "tokens a second"], rows)


def _all_points(points: Points) -> Table:
    rows = []
    for p in points:
        measured = [
            seconds(p.get("seconds_to_first_token")),
            plain(p.get("tokens_per_second")),
            plain(p.get("roofline_tokens_per_second")),
            share(p.get("roofline_share")),
            size(p.get("peak_bytes")),
            size(p.get("formula_bytes")),
        ]
        where = [
            Cell(NAMES.get(p["model"], str(p["model"]))),
            Cell(p["engine"]),
            count(p["batch"]),
            count(p["context"]),
        ]
        why = ": ".join(str(p[key]) for key in ("error", "reason") if p.get(key))
        rows.append([*where, count(p.get("new_tokens")), *measured, Cell(why)])
    head = ["model", "engine", "batch", "context", "new tokens", "first token", "tokens a second", "roofline"]
    return Table("Every point", [*head, "share of it", "peak", "formula", "error"], rows, folded=True, left=2)


def _models(bench: Mapping[str, Any]) -> list[Table]:
    """The bytes from which rooflines and formulas follow, and what the models are."""
    models: Mapping[str, Mapping[str, Any]] = bench.get("models") or {}
    names = list(dict.fromkeys(key for its in models.values() for key in its if not isinstance(its[key], Mapping)))
    rows = [[Cell(key.replace("_", " ")), *(_fact(key, its.get(key)) for its in models.values())] for key in names]
    return [Table("What the models hold", ["", *(NAMES.get(m, m) for m in models)], rows, folded=True)]


def _fact(key: str, value: Any) -> Cell:
    if finite(value):
        return size(value) if "bytes" in key else plain(value)
    return Cell(", ".join(map(str, value)) if isinstance(value, list) else str(value or "–"))


def _device(bench: Mapping[str, Any]) -> str:
    device: Mapping[str, Any] = bench.get("device") or {}
    told = {key: value for key, value in device.items() if isinstance(value, str | int | float)}
    parts = [f"{key.replace('_', ' ')} {_fact(key, value).text}" for key, value in told.items()]
    bandwidth = bench.get("bandwidth_bytes_per_second")
    if finite(bandwidth):
        parts.append(f"bandwidth {size(bandwidth).text}/s as measured")
    return f"Device: {'; '.join(parts)}." if parts else ""
