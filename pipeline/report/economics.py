"""The section of costs: what the cache takes, planned beside actual, and the time of each stage."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.bars import Bar, bar_chart
from pipeline.report.blocks import Cell, Chart, Section, Table, count, finite, plain, seconds, size
from pipeline.report.curves import PLAIN, time_chart
from pipeline.report.tasks import Report

# What the record of `cache` calls its parts, and what they are called here.
PARTS = {"target_bytes": "targets", "tap_bytes": "taps", "vision_bytes": "vision features"}
Signal = Mapping[str, Any]


def economics_section(report: Report) -> Section | None:
    """Bytes of the cache by part, every signal of the plan, bytes a response token, and the stages' times."""
    cache, plan = report.get("cache"), report.get("planned")
    charts = [_sizes_chart(cache) if cache else None, time_chart(report)]
    tables = [table for table in (_parts(cache, plan, report), _signals(plan)) if table]
    if not tables and not any(charts):
        return None
    unplanned = "There is no plan beside it: the teacher or the data could not be read."
    notes = [*_cache_notes(cache), *(_plan_notes(plan) if plan else [unplanned])]
    return Section("economics", "Cache and time", [c for c in charts if c], tables, notes)


def _sizes_chart(cache: Mapping[str, Any]) -> Chart | None:
    sizes = {
        "full logits, 16 bit": cache.get("full_logits_bytes_per_response_token"),
        "this cache's targets": cache.get("bytes_per_response_token"),
    }
    bars = [(name, [Bar(PLAIN, "", value)]) for name, value in sizes.items() if finite(value) and value]
    title = "Bytes a response token, logarithmic"
    return bar_chart(title, bars, "bytes a response token", text=lambda value: size(value).text, log=True)


def _parts(cache: Mapping[str, Any] | None, plan: Mapping[str, Any] | None, report: Report) -> Table | None:
    """Planned beside actual, part by part; the actual parts are columns' bytes, the whole is files with footers."""
    planned = _planned_parts(plan)
    if cache is None and not planned:
        return None
    actual = cache or {}
    names = [key for key in PARTS if key in actual or PARTS[key] in planned]
    rows = [_compared(PARTS[key], size(planned.get(PARTS[key])), size(actual.get(key))) for key in names]
    rows.append(_compared("whole cache", size(plan["cache"]["bytes"] if plan else None), size(actual.get("bytes"))))
    stages = report.get("stages") or {}
    took = seconds(stages["cache"]["seconds"] if "cache" in stages else None)
    # of other hardware, so that their ratio says nothing
    rows.append([Cell("teacher's pass"), seconds(_pass_seconds(plan)), took, Cell("")])
    return Table("The cache, planned and actual", ["", "planned", "actual", "actual / planned"], rows)


def _compared(name: str, planned: Cell, actual: Cell) -> list[Cell]:
    ratio = plain(actual.value / planned.value) if planned.value and actual.value is not None else Cell("–")
    return [Cell(name), planned, actual, ratio]


def _planned_parts(plan: Mapping[str, Any] | None) -> dict[str, float]:
    """Bytes of what the run itself caches."""
    found: dict[str, float] = {}
    for signal in plan["signals"] if plan else ():
        if signal["own"]:
            part = _part(signal["group"])
            found[part] = found.get(part, 0.0) + signal["bytes"]
    return found


def _part(group: str) -> str:
    return "targets" if group.startswith("targets") else "vision features" if group.startswith("vision") else "taps"


def _pass_seconds(plan: Mapping[str, Any] | None) -> float | None:
    """One forward of the teacher over the data, the head at the run's own positions."""
    own = [s["pass_seconds"] for s in plan["signals"] if s["own"] and _part(s["group"]) == "targets"] if plan else []
    return own[0] if own else None


def _signals(plan: Mapping[str, Any] | None) -> Table | None:
    if not plan:
        return None
    rows = [_signal(signal) for signal in plan["signals"]]
    head = ["signal", "where", "own", "bytes", "bytes / sample", "teacher", "$ / month", "break-even", "answer"]
    return Table("Every signal of the plan", head, rows, folded=True, left=3)


def _signal(signal: Signal) -> list[Cell]:
    return [
        Cell(signal["name"]),
        Cell(signal["group"]),
        Cell("yes" if signal["own"] else ""),
        size(signal["bytes"]),
        size(signal["bytes_per_sample"]),
        seconds(signal["pass_seconds"]),
        plain(signal["dollars_per_month"]),
        plain(signal["break_even_passes"]),
        Cell(signal["answer"]),
    ]


def _cache_notes(cache: Mapping[str, Any] | None) -> Sequence[str]:
    if not cache:
        return []
    said = (
        f"{count(cache['samples']).text} samples with {count(cache['response_tokens']).text} response tokens in "
        f"{cache['shards']} shards. Parts are the bytes of columns; the whole is files with their footers."
    )
    logits = cache.get("full_logits_bytes_per_response_token")
    if logits is None:
        return [said]
    vocabulary = count(cache["vocabulary"]).text
    return [said, f"Full logits over this vocabulary of {vocabulary} would take {count(logits).text} B a token."]


def _plan_notes(plan: Mapping[str, Any]) -> Sequence[str]:
    name, data = plan["accelerator"]["name"], plan["data"]
    measured = plan.get("measured")
    source = f"a probe of {count(measured['samples']).text} samples" if measured else "formulas, without a probe"
    return [
        f"Planned by {source}, from {count(data['seen']).text} of {count(data['samples']).text} samples. The planned "
        f"time is the arithmetic of one {name}; the actual one is of all workers on this run's hardware, with starts, "
        f"so no ratio is given. Break-even is in passes of the teacher a month."
    ]
