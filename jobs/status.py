"""``decant status``: where each stage of a run stands, from the store alone, also while it runs elsewhere.

Needs neither the data nor the teacher, and imports no framework: it answers at once, on any machine.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Shown

from jobs.figures import human_bytes, human_span
from jobs.stages import NAMES, open_store
from pipeline.observe import Seen, Shards, Training, observe
from pipeline.store import Store
from schemas.config import RunConfig

COLOURS = {"done": "green", "running": "cyan", "stopped": "yellow", "failed": "red", "not begun": "dim"}
# Failed shards named one by one: a line of them.
NAMED = 8


def status(run: RunConfig, out: Console, *, as_json: bool, watch: float | None) -> None:
    """Prints where every stage stands, again and again with ``watch`` (seconds between) until all are done."""
    store = open_store(run)
    while True:
        seen = [observe(store, run.ref(name), run.ref("prepare") if name == "cache" else None) for name in NAMES]
        if as_json:
            print(json.dumps({"store": store.url, "run": run.name, "stages": list(map(_values, seen))}), flush=True)
        else:
            if watch is not None:
                out.clear()
            _show(store, run, seen, out)
        if watch is None or all(stage.state == "done" for stage in seen):
            return
        time.sleep(watch)


def _values(seen: Seen) -> dict[str, Any]:
    """A stage for programs, with what follows from its figures."""
    shards = seen.shards and {
        **asdict(seen.shards),
        "pending": seen.shards.pending,
        "seconds_left": seen.shards.seconds_left,
    }
    return {**asdict(seen), "shards": shards}


def _show(store: Store, run: RunConfig, seen: list[Seen], out: Console) -> None:
    table = Shown.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for stage in seen:
        lines = "\n".join(escape(line) for line in _lines(stage))
        table.add_row(f"[bold]{stage.stage}[/]", f"[{COLOURS[stage.state]}]{stage.state}[/]", lines)
    out.print(f"[bold]{escape(run.name)}[/] in {escape(store.url)}")
    out.print(table, soft_wrap=False)


def _lines(seen: Seen) -> Iterator[str]:
    running = seen.state == "running"
    if seen.state == "done":
        yield _headline(seen)
    if seen.shards and seen.state != "done":
        yield from _progress(seen.shards, running=running)
    if seen.training:
        yield from _steps(seen.training, running=running)
    yield from _troubles(seen)
    if running and seen.silent is not None:
        job = f", job {seen.job}" if seen.job else ""
        yield f"last sign of life {human_span(seen.silent)} ago{job}"
    if seen.state == "stopped" and seen.silent is not None:
        why = seen.error or f"no sign of life for {human_span(seen.silent)}"
        yield f"{why}; the same command goes on with what is missing"
    if seen.state == "failed" and seen.error:
        yield seen.error


def _progress(shards: Shards, *, running: bool) -> Iterator[str]:
    parts = [f"{shards.done} of {'?' if shards.total is None else shards.total} shards"]
    if shards.of_samples:
        parts.append(f"{shards.samples:,} of {shards.of_samples:,} samples")
    if running and shards.rate:
        each = shards.of_samples / shards.total if shards.of_samples and shards.total else None
        parts.append(f"{shards.rate * each:.1f} samples/s" if each else f"{shards.rate:.2f} shards/s")
    if running and shards.seconds_left is not None:
        parts.append(f"{human_span(shards.seconds_left)} left")
    yield ", ".join(parts)
    if shards.failed:
        more = f" and {len(shards.failed) - NAMED} more" if len(shards.failed) > NAMED else ""
        yield f"{len(shards.failed)} failed: {', '.join(map(str, shards.failed[:NAMED]))}{more}"


def _steps(training: Training, *, running: bool) -> Iterator[str]:
    left = f", {human_span(training.seconds_left)} left" if running else ""
    yield f"step {training.done} of {training.total}{left}"
    yield f"phase {training.phase + 1} ({training.kind}), its step {training.step} of {training.steps}"
    losses = ", ".join(f"{name} {value:.4g}" for name, value in training.losses.items())
    yield f"{losses}; {training.tokens_per_second:,.0f} tokens/s"
    yield f"last checkpoint {training.checkpoint or 'none yet'}"


def _troubles(seen: Seen) -> Iterator[str]:
    """What did not go at the first attempt, in one line."""
    counts = {
        "commands": seen.commands if seen.commands > 1 else 0,
        "worker groups lost": seen.lost,
        "shards begun again": seen.shards.again if seen.shards else 0,
    }
    if any(counts.values()):
        yield ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def _headline(seen: Seen) -> str:
    """The figures by which a finished stage is known."""
    result, took = seen.result or {}, f"in {human_span(seen.seconds or 0.0)}"
    if seen.stage in ("prepare", "cache"):
        rows, count = result.get("samples", 0), result.get("bytes", 0)
        return f"{rows:,} samples, {result.get('shards', 0)} shards, {human_bytes(count)}, {took}"
    if seen.stage == "distill":
        last = result.get("last", {})
        losses = "".join(f", {name} {last[name]:.4g}" for name in ("loss", "kl", "held_out_kl") if name in last)
        return f"{result.get('steps', 0)} steps{losses}, {took}"
    if seen.stage == "evaluate":
        scores = {who: result[who]["exact_match"]["overall"]["value"] for who in ("teacher", "student")}
        kl = result["student"]["held_out_kl"]
        return f"exact match {scores['student']:.3f} (teacher {scores['teacher']:.3f}), held-out KL {kl:.4g}, {took}"
    return f"{len(result.get('files', ()))} files, {human_bytes(sum(result.get('files', {}).values()))}, {took}"
