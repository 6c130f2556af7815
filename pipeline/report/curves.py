"""The sections of training and of the distribution: losses, layers, KL, agreement and calibration."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.report.bars import Bar, bar_chart
from pipeline.report.blocks import Cell, Chart, Section, Table, code, count, finite, plain, share, size
from pipeline.report.plots import Axes, Series, line_chart, reliability_chart
from pipeline.report.scales import percent
from pipeline.report.svg import COLOURS, WHO, Style, style
from pipeline.report.tasks import Report

LOSSES = {
    "kl": "KL to the targets",
    "held_out_kl": "KL, held-out samples",
    "ce": "cross-entropy",
}
# What of a phase's last entry is shown, under which name and how.
ENDS: dict[str, tuple[str, Callable[[Any], Cell]]] = {
    "loss": ("loss", plain),
    "kl": ("KL", plain),
    "ce": ("cross-entropy", plain),
    "held_out_kl": ("held-out KL", plain),
    "held_out_top1": ("held-out agreement", share),
    "tokens_per_second": ("tokens a second", plain),
    "waiting_share": ("without data", share),
    "padding_share": ("padding", share),
    "memory_bytes": ("memory", size),
    "workers": ("workers", count),
}
PLAIN = WHO["student"]
FAINT = Style("faint", "")
Entry = Mapping[str, Any]


def training_section(report: Report) -> Section | None:
    """Losses and layer losses against the step, and each phase's end."""
    curve: Sequence[Entry] = report.get("curve") or []
    if not curve:
        return None
    offsets, rules = _offsets(curve)
    losses = [Series(style(i), _points(curve, offsets, name), text) for i, (name, text) in enumerate(LOSSES.items())]
    axes = Axes("optimizer step", "nats a token", log_y=True)
    agreement = [Series(PLAIN, _points(curve, offsets, "held_out_top1"), "top-1 agreement, held-out samples")]
    charts = [
        line_chart("Loss against the step", axes, losses, rules),
        _layers_chart(curve, offsets, rules),
        line_chart(
            "Agreement against the step", Axes("optimizer step", "share of positions", text_y=percent), agreement, rules
        ),
    ]
    notes = [
        "Means over the steps since the point before; a vertical line is where a phase begins. The KL to sampled "
        "targets is an unbiased estimate, which few batches can bring below 0: what is not above 0 is not drawn. A "
        "layer's loss is its squared error as a share of its target's power."
    ]
    return Section("training", "Losses", [c for c in charts if c], [_phases(curve), *_layers_table(curve)], notes)


def _offsets(curve: Sequence[Entry]) -> tuple[dict[int, int], list[float]]:
    """How many steps come before each phase, and where phases after the first begin."""
    offsets: dict[int, int] = {}
    total = 0
    for entry in curve:
        if entry["phase"] not in offsets:
            offsets[entry["phase"]] = total
            total += entry["steps"]
    return offsets, [float(at) for at in list(offsets.values())[1:]]


def _points(curve: Sequence[Entry], offsets: Mapping[int, int], name: str) -> list[tuple[float, float]]:
    """A step whose batch holds no taps logs a layer loss of 0, which is no measurement."""
    return [(float(offsets[e["phase"]] + e["step"]), e[name]) for e in curve if finite(e.get(name)) and e[name] > 0]


def _layer_names(curve: Sequence[Entry]) -> list[str]:
    return sorted({k for e in curve for k in e if k.startswith("layer_")}, key=lambda name: int(name[6:]))


def _layers_chart(curve: Sequence[Entry], offsets: Mapping[int, int], rules: Sequence[float]) -> Chart | None:
    """A line a layer; of more than eight, which cannot be told apart, only the best and the worst are named."""
    points = {name: _points(curve, offsets, name) for name in _layer_names(curve)}
    points = {name: found for name, found in points.items() if found}
    axes = Axes("optimizer step", "layer loss, relative", log_y=True)
    if len(points) <= COLOURS:
        series = [Series(style(i), found, name.replace("_", " ")) for i, (name, found) in enumerate(points.items())]
        return line_chart("Layer losses against the step", axes, series, rules)
    ranked = sorted(points, key=lambda name: points[name][-1][1])
    series = [Series(FAINT, points[name], "the others" if name == ranked[1] else None) for name in ranked[1:-1]]
    named = ((ranked[-1], "highest in the end"), (ranked[0], "lowest"))
    series += [Series(style(i), points[n], f"{n.replace('_', ' ')}, {what}") for i, (n, what) in enumerate(named)]
    return line_chart("Layer losses against the step", axes, series, rules)


def _phases(curve: Sequence[Entry]) -> Table:
    """What the last entry of each phase says."""
    last = {entry["phase"]: entry for entry in curve}
    shown = {name: its for name, its in ENDS.items() if any(name in e for e in last.values())}
    rows = [
        [code(e["kind"]), count(e["steps"]), *(text(e.get(name)) for name, (_, text) in shown.items())]
        for e in last.values()
    ]
    head = ["phase", "steps", *(title for title, _ in shown.values())]
    return Table("The end of each phase", head, rows)


def _layers_table(curve: Sequence[Entry]) -> list[Table]:
    names = _layer_names(curve)
    last = {name: [e[name] for e in curve if finite(e.get(name)) and e[name] > 0][-1:] for name in names}
    rows = [[Cell(name.replace("_", " ")), plain(found[0])] for name, found in last.items() if found]
    return [Table("Layer losses in the end", ["layer", "relative loss"], rows, folded=True)] if rows else []


def distribution_section(report: Report) -> Section | None:
    """KL, agreement, calibration and layers' errors on cached targets that no training saw."""
    found = report.get("distribution")
    if not found:
        return None
    layers = {f"layer {name}": error for name, error in (found.get("layers") or {}).items()}
    bars = [(name, [Bar(PLAIN, "", error)]) for name, error in layers.items() if finite(error)]
    charts = [
        reliability_chart("Reliability of the student's confidence", _bins(found), PLAIN),
        bar_chart("Relative error of each replaced layer", bars, "squared error / target's power"),
    ]
    tables = [Table("Distribution", ["figure", "student"], _distribution_rows(found))]
    tables += _bins_table(found)
    if layers:
        rows = [[Cell(name), plain(error)] for name, error in layers.items()]
        tables.append(Table("Relative error by layer", ["layer", "squared error / target's power"], rows, folded=True))
    note = (
        "From the cache's held-out targets alone, no teacher forward; ECE is the expected calibration error over "
        "equal-width bins (Guo et al. 2017). In the diagram a larger circle holds more tokens, and on the dashed line "
        "confidence is as high as accuracy."
    )
    absent = [f"{name.replace('_', ' ')}: {why}." for name, why in (found.get("notes") or {}).items()]
    return Section("distribution", "Distribution", [c for c in charts if c], tables, [note, *absent])


def _distribution_rows(found: Mapping[str, Any]) -> list[list[Cell]]:
    """The known figures, and any other that has a value or is a text."""
    names = {"kl": "KL(teacher ‖ student), nats a token", "ece": "ECE", "teacher_ece": "ECE of the teacher"}
    rows = []
    for key, value in found.items():
        name = names.get(key, key.replace("_", " ").replace("top1", "top-1"))
        if isinstance(value, Mapping) and "value" in value:
            text = plain if key == "kl" else share
            rows.append([Cell(name), text(value["value"], value.get("ci95"))])
        elif isinstance(value, int | str):
            rows.append([Cell(name), count(value) if isinstance(value, int) else Cell(value)])
        elif isinstance(value, float) or value is None:
            rows.append([Cell(name), plain(value)])
    return rows


def _bins(found: Mapping[str, Any]) -> list[tuple[float, float, float]]:
    """The bins that hold anything."""
    bins = [(b["confidence"], b["accuracy"], b["share"]) for b in found.get("bins") or []]
    return [(c, a, s) for c, a, s in bins if finite(c) and finite(a) and s]


def _bins_table(found: Mapping[str, Any]) -> list[Table]:
    rows = [[share(c), share(a), share(s)] for c, a, s in _bins(found)]
    head = ["confidence", "share of them right", "share of the tokens"]
    return [Table("Bins of the reliability diagram", head, rows, folded=True)] if rows else []


def time_chart(report: Report) -> Chart | None:
    """Seconds of each stage."""
    bars = [(name, [Bar(PLAIN, "", its["seconds"])]) for name, its in (report.get("stages") or {}).items()]
    return bar_chart("Time of each stage", bars, "seconds")
