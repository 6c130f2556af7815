"""``decant bench``: how fast teacher and student generate on this machine, beside what their bytes allow.

One model after the other on the same device, by the same engine; transformers'
``generate()`` is measured beside it and tells what the engine gains, of either model. No Ray: what is measured is
this process's device.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from jobs.bench_table import show
from jobs.contestants import Contestant
from jobs.figures import human_bytes
from jobs.progress import Progress
from pipeline.decoding.timing import ENGINES
from pipeline.meter import BenchSettings, Meter, free, memory_of, refused
from pipeline.models import decoder
from pipeline.report.speed import memory_chart, speed_chart
from pipeline.roofline import copy_bandwidth, footprint
from pipeline.stage import provenance
from pipeline.surgery import mixers
from schemas.errors import ConfigInvalid, MemoryExhausted, StoreUnavailable
from schemas.sections import Dtype

# Contexts, batches and type where none are given: for a 3B model on a large GPU, or a small one on a CPU.
DEFAULTS: dict[str, tuple[str, str, Dtype]] = {
    "cuda": ("1k,2k,4k,8k,16k,32k,64k", "1,8", "bfloat16"),
    "cpu": ("256,512,1k", "1,4", "float32"),
}


@dataclass(frozen=True)
class Asked:
    """What the command line says, None where it leaves the choice."""

    contexts: str | None
    batches: str | None
    engines: str
    new_tokens: int
    repeats: int
    dtype: Dtype | None
    seed: int

    def settings(self, device: torch.device) -> BenchSettings:
        """What is measured on this device.

        Raises:
            ConfigInvalid: a list of numbers or names is not one.
        """
        contexts, batches, dtype = DEFAULTS[device.type]
        return BenchSettings(
            whole_numbers(self.contexts or contexts, "--contexts"),
            whole_numbers(self.batches or batches, "--batches"),
            engine_names(self.engines),
            self.new_tokens,
            self.repeats,
            self.dtype or dtype,
            self.seed,
        )


def run_bench(
    contestants: Sequence[Contestant], asked: Asked, device: torch.device, folder: Path | None, out: Console
) -> None:
    """Measures, prints the table, and writes ``bench.json`` and pictures where there is a ``folder`` for them.

    Raises:
        ConfigInvalid: what is asked for is not possible.
        MemoryExhausted: a model's weights alone do not fit the device.
        StoreUnavailable: the folder cannot be written.
    """
    settings = asked.settings(device)
    if folder:
        prepare_folder(folder)
    result = bench(contestants, settings, device)
    show(result, out)
    if folder:
        out.print(f"wrote {', '.join(write(result, folder))} into {folder}", markup=False)


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    """The numbers of an option, ascending: ``1k,4k,16384`` (k is 1,024).

    Raises:
        ConfigInvalid: one is no whole number above 0.
    """
    parts = [part.strip().lower() for part in text.split(",")]
    found = [part[:-1] if part.endswith("k") else part for part in parts]
    if not all(digits.isdecimal() and int(digits) > 0 for digits in found):
        raise ConfigInvalid(f"{option} {text}: expected whole numbers above 0 with commas between, such as 1k,4k,16k")
    return tuple(sorted({int(d) * (1024 if p.endswith("k") else 1) for d, p in zip(found, parts, strict=True)}))


def engine_names(text: str) -> tuple[str, ...]:
    """The engines of ``--engines``, in the order in which they are measured.

    Raises:
        ConfigInvalid: one is not known.
    """
    asked = [part.strip() for part in text.split(",")]
    if wrong := [name for name in asked if name not in ENGINES]:
        raise ConfigInvalid(f"--engines {text}: {', '.join(wrong)} is not known; there are {', '.join(ENGINES)}")
    return tuple(name for name in ENGINES if name in asked)


def bench(contestants: Sequence[Contestant], settings: BenchSettings, device: torch.device) -> dict[str, Any]:
    """Measures all; the result is plain values, as ``bench.json`` has them.

    Raises:
        ConfigInvalid: the models compute attention by different kernels.
        MemoryExhausted: a model's weights alone do not fit the device.
    """
    bandwidth, memory = copy_bandwidth(device), memory_of(device)
    free(device)
    models: dict[str, dict[str, Any]] = {}
    points: list[dict[str, Any]] = []
    number = len(settings.contexts) * len(settings.batches) * len(settings.engines)
    with Progress("bench", number * len(contestants), "points") as progress:
        for contestant in contestants:
            model = _load(contestant, settings, device)
            meter = Meter(contestant.who, model, footprint(model), settings, bandwidth.median, memory)
            models[contestant.who] = _facts(contestant, meter)
            _refuse_unlike(models)
            for point in meter.all():
                points.append(point)
                progress.update(len(points), f"{point['model']} {point['engine']} {point['batch']}×{point['context']}")
            del model, meter
            free(device)
    return {
        "device": _device(device, memory),
        "bandwidth_bytes_per_second": bandwidth.median,
        "bandwidth_range": [bandwidth.least, bandwidth.most],
        "settings": asdict(settings),
        "models": models,
        "points": sorted(points, key=lambda p: (p["batch"], p["context"], list(ENGINES).index(p["engine"]))),
    }


def _load(contestant: Contestant, settings: BenchSettings, device: torch.device) -> PreTrainedModel:
    try:
        return contestant.load(getattr(torch, settings.dtype), device)
    except RuntimeError as error:
        if not refused(error):
            raise
        raise MemoryExhausted(
            f"bench: the {contestant.who} ({contestant.weights}) in {settings.dtype} does not fit the memory of "
            f"{device} ({human_bytes(memory_of(device))}); take a smaller type (--dtype), model or a larger device"
        ) from None


def _refuse_unlike(models: dict[str, dict[str, Any]]) -> None:
    kernels = {who: facts["attention"] for who, facts in models.items()}
    if len(set(kernels.values())) > 1:
        raise ConfigInvalid(f"bench: attention is computed by different kernels, which cannot be compared: {kernels}")


def _device(device: torch.device, memory: int) -> dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "type": device.type,
        "name": torch.cuda.get_device_name(device) if cuda else f"CPU, threads: {torch.get_num_threads()}",
        "memory_bytes": memory,
        "peak_bytes": "the allocator's largest sum" if cuda else "not measured: torch does not count a CPU's memory",
        **provenance(),
    }


def _facts(contestant: Contestant, meter: Meter) -> dict[str, Any]:
    """What a model is and what it moves; ``largest_batch`` is by the formula, for every context."""
    found, its = mixers(meter.model), meter.bytes
    largest = {str(c): its.largest_batch(meter.memory, c + meter.settings.new_tokens) for c in meter.settings.contexts}
    return {
        "weights": contestant.weights,
        "layers": len(decoder(meter.model).layers),  # type: ignore[arg-type]
        "replaced": sorted(found),
        "attention": decoder(meter.model).config._attn_implementation,  # type: ignore[union-attr]
        "backend": next(iter(found.values())).ops.backend if found else None,
        "weights_bytes": its.held,
        "weights_read_bytes": its.read,
        "kv_bytes_per_token": its.cached_bytes(1),
        "state_bytes": its.states,
        "largest_batch": largest,
    }


def write(result: dict[str, Any], folder: Path) -> list[str]:
    """Writes ``bench.json`` and the pictures; returns their names.

    Raises:
        StoreUnavailable: the folder cannot be written.
    """
    files = {"bench.json": (json.dumps(result, indent=1) + "\n").encode()}
    for name, chart in (("speed", speed_chart), ("memory", memory_chart)):
        files |= {f"{name}.svg": chart(result, "svg"), f"{name}.png": chart(result, "png")}
    prepare_folder(folder)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return list(files)


def prepare_folder(folder: Path) -> None:
    """Makes the folder, before minutes are spent on what could not be written into it.

    Raises:
        StoreUnavailable: it cannot be made, or not written into.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreUnavailable(f"--out {folder}: cannot be made: {error.strerror or error}") from None
    if not os.access(folder, os.W_OK):
        raise StoreUnavailable(f"--out {folder}: cannot be written into; give a folder that can")
