"""``decant plan``: what each signal of the teacher would cost to cache, before anything runs; writes nothing."""

import json
import os
from dataclasses import asdict, dataclass
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jobs.figures import human_bytes, human_number, human_time
from jobs.probe import Measured, probe
from jobs.stages import layer_plan, load_stage, open_store, tapped_layers
from pipeline.data.encoding import EncodedSample, Encoder
from pipeline.data.processors import load_processor
from pipeline.planning.compute import ModelSize, model_size
from pipeline.planning.costs import NEXT_TO_NOTHING, STEP, Cost, cost
from pipeline.planning.lengths import Lengths, encoded_samples, measure, prepared_samples
from pipeline.planning.signals import UNIQUE, Signal, row_bytes, shard_overhead, signals
from pipeline.stage import read_record
from schemas.accelerators import Accelerator, Storage, load_rates
from schemas.config import RunConfig

# Samples of the probe where the user gives no number: on the demo, ten seconds in which to take the rate.
PROBE = 512
# A probe that nobody asked for must not keep anyone waiting longer than this, beside starting Ray.
PROBE_SECONDS = 60.0
# FLOP/s of a core with the demo's teacher; larger models reach more.
CORE_FLOPS = 2e10
# Columns of a terminal that the table needs.
WIDTH = 120


@dataclass(frozen=True)
class Plan:
    """What was found out and computed; ``prepared`` says whether the lengths are of the ``samples`` table."""

    run: RunConfig
    accelerator_name: str
    accelerator: Accelerator
    storage: Storage
    passes: float
    size: ModelSize
    lengths: Lengths
    prepared: bool
    measured: Measured | None
    rows: list[tuple[Signal, Cost]]

    @property
    def bytes(self) -> float:
        """Of the run's whole cache."""
        return sum(signal.bytes for signal, _ in self.rows if signal.own)

    @property
    def shards(self) -> int:
        """Of the run's cache."""
        return -(-self.lengths.samples // self.run.prepare.shard_rows)

    @property
    def weights_bytes(self) -> int:
        """What the teacher's weights take in memory, in the type that it runs in."""
        return self.size.parameters * (2 if self.run.cache.dtype == "bfloat16" else 4)


def rates_file() -> Path:
    """The table of accelerators that is shipped."""
    return Path(str(resources.files("jobs") / "configs" / "accelerators.yaml"))


def make_plan(run: RunConfig, accelerator: str, rates_path: Path | None, passes: float, samples: int | None) -> Plan:
    """Plans the run's cache; ``samples`` is how many the teacher runs on, chosen here if None.

    Raises:
        ConfigInvalid: the run or the table of accelerators is not valid, or the probe does not fit this machine.
        SampleInvalid: `prepare` has not run, and the data cannot be used.
    """
    rates = load_rates(rates_path or rates_file())
    chosen = rates.accelerator(accelerator)
    load_stage("cache", run)
    size, processor = model_size(run.teacher), load_processor(run.teacher)
    image_token = processor.image_token_id
    prepared = read_record(open_store(run), run.ref("prepare")) is not None
    pool, total = _pool(run, processor, prepared)
    lengths = measure(pool, total, run.cache, image_token)
    measured, correction = None, 1.0
    count = _worth(run, size, lengths) if samples is None else samples
    if count:
        part = (_with_images(run, count) if prepared else pool)[:count]
        measured = probe(run, part)
        correction = _correction(run, size, measure(part, None, run.cache, image_token), measured)
    layers = (tapped_layers(run), layer_plan(run).replaced)
    found = signals(size, lengths, run.cache, run.prepare.shard_rows, *layers, correction)
    costs = [cost(s, size, lengths, chosen, rates.storage, run.cache.dtype, passes) for s in found]
    table = list(zip(found, costs, strict=True))
    return Plan(run, accelerator, chosen, rates.storage, passes, size, lengths, prepared, measured, table)


def _pool(run: RunConfig, processor: Any, prepared: bool) -> tuple[list[EncodedSample], int]:
    """Some of the samples, and the number of all."""
    if prepared:
        return prepared_samples(open_store(run), run.ref("prepare"))
    return encoded_samples(run.prepare, Encoder(processor, run.prepare.max_length, run.prepare.template))


def _with_images(run: RunConfig, count: int) -> list[EncodedSample]:
    return prepared_samples(open_store(run), run.ref("prepare"), count, images=True)[0]


def _correction(run: RunConfig, size: ModelSize, part: Lengths, measured: Measured) -> float:
    """What the probe's rows take over what was computed of them."""
    taken = measured.target_bytes - shard_overhead(size, part, run.cache)
    return taken / row_bytes(size, part, run.cache)


def _worth(run: RunConfig, size: ModelSize, lengths: Lengths) -> int:
    """How many samples to probe where nobody said: none if this machine cannot, or only slowly."""
    place = run.placement.cache
    gpus = place.workers * place.gpus_per_worker
    if gpus:
        return PROBE if torch.cuda.device_count() >= gpus else 0
    seconds = PROBE * size.pass_flops(lengths, lengths.positions[run.cache.positions]) / lengths.samples
    return PROBE if seconds <= PROBE_SECONDS * CORE_FLOPS * (os.cpu_count() or 1) else 0


def as_json(plan: Plan) -> str:
    """The plan in bytes, seconds and dollars; rates are of one accelerator."""
    lengths, found = plan.lengths, plan.measured
    return json.dumps(
        {
            "run": plan.run.name,
            "accelerator": {"name": plan.accelerator_name, **plan.accelerator.model_dump()},
            "storage": plan.storage.model_dump(),
            "passes_per_month": plan.passes,
            "teacher": {**asdict(plan.size), "weights_bytes": plan.weights_bytes},
            "data": {"prepared": plan.prepared, **asdict(lengths)},
            "cache": {"bytes": plan.bytes, "shards": plan.shards},
            "measured": found and {**asdict(found), "cache_seconds": found.seconds(lengths.samples)},
            "signals": [{**asdict(signal), **_shares(lengths, signal), **asdict(its)} for signal, its in plan.rows],
        },
        indent=1,
    )


def _shares(lengths: Lengths, signal: Signal) -> dict[str, float]:
    return {
        "bytes_per_sample": signal.bytes / lengths.samples,
        "bytes_per_response_token": signal.bytes / lengths.response_tokens,
    }


def show(plan: Plan, out: Console) -> None:
    """Prints the table, and what of it was measured and what assumed."""
    table = Table("signal", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, width=WIDTH)
    for name in ("bytes", "/sample", "/resp.\ntoken", "teacher", "write/s", "read/s", "$/month", "break-\neven"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("answer", no_wrap=True)
    for group, rows in groupby(plan.rows, lambda row: row[0].group):
        table.add_section()
        table.add_row(f"[italic]{group}[/]")
        for signal, its in rows:
            table.add_row(*_cells(plan.lengths, signal, its), style="bold" if signal.own else "")
    out.print(table)
    for line in (*_notes(plan), _measured_note(plan)):
        out.print(line, markup=False)


def _cells(lengths: Lengths, signal: Signal, its: Cost) -> list[str]:
    return [
        ("* " if signal.own else "  ") + signal.name,
        human_bytes(signal.bytes),
        *(human_bytes(share) for share in _shares(lengths, signal).values()),
        human_time(its.pass_seconds),
        human_bytes(its.write_bytes_per_second),
        human_bytes(its.read_bytes_per_second),
        human_number(its.dollars_per_month),
        human_number(its.break_even_passes),
        f"slice ≤ {100 * its.largest_fraction:.2g} %" if its.answer == "bounded slice" else its.answer,
    ]


def _notes(plan: Plan) -> list[str]:
    lengths, run, name, chosen = plan.lengths, plan.run, plan.accelerator_name, plan.accelerator
    tokens, images, answers = (
        total / lengths.samples for total in (lengths.tokens, lengths.image_tokens, lengths.response_tokens)
    )
    source = "samples table" if plan.prepared else "data file (an estimate)"
    fits = "" if plan.weights_bytes <= chosen.memory_gib * 2**30 else f", more than its {chosen.memory_gib:g} GiB"
    return [
        f"*: this run's cache, {human_bytes(plan.bytes)} in {plan.shards} shards",
        f"lengths: {lengths.samples:,} samples of {tokens:.1f} tokens, {images:.1f} of images and {answers:.1f} of "
        f"answers; by {lengths.seen:,} of the {source}",
        f"teacher: one pass on one {name}, {chosen.flops(run.cache.dtype) / 1e12:.3g} TFLOP/s in {run.cache.dtype} at "
        f"${chosen.dollars_per_hour:g} an hour; its weights take {human_bytes(plan.weights_bytes)}{fits}",
        f"write/s: of one {name} with the teacher; read/s: of one that trains, in {STEP:g} of its forwards a step",
        f"answer: cache where a month's storage costs at most {plan.passes:g} passes of the teacher or "
        f"${NEXT_TO_NOTHING:g}, and a training",
        f"        {name} reads at most its share of a node, {human_bytes(plan.storage.read_rate)}/s",
    ]


def _measured_note(plan: Plan) -> str:
    found = plan.measured
    if found is None:
        unique = ", ".join(f"{UNIQUE[k]:g} ({k})" for k in UNIQUE)
        return (
            f"assumed: distinct ids of 50 draws a position, {unique};\n"
            f"         `--probe {PROBE}` runs the teacher here on so many samples and measures bytes and time"
        )
    return (
        f"measured here, {found.samples} samples: {found.samples_per_second:.3g} samples/s by "
        f"{plan.run.placement.cache.workers} workers and {found.overhead_seconds:.0f} s to start and end;\n"
        f"               `decant cache` would take {found.seconds(plan.lengths.samples):.0f} s; "
        "the run's own targets are scaled from these"
    )
