"""Decoding of teacher and student beside their rooflines: ``python -m tests.bench.decode`` on a GPU.

Random weights of Phi-2's size, half of the layers replaced. Both models decode by the engine that evaluation uses, one
after the other in one run; at some points transformers' ``generate()`` is measured beside it. The floor is the bytes
that a step must move over the bandwidth of copies on the device, measured in the same run; memory is held against the
formula of weights, keys, values and states. ``--small`` is for a machine without a GPU, to see that it runs.
"""

import argparse
import gc
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PhiConfig, PreTrainedModel

from jobs.contestants import Contestant, drawn, of_folders
from pipeline.decoding.engine import DecodingEngine
from pipeline.decoding.timing import random_prompts
from pipeline.meter import BenchSettings, Meter, free, memory_of
from pipeline.roofline import copy_bandwidth, footprint
from schemas.layers import LayersConfig
from tests.bench.kernels import describe, recorded_kernels
from tests.bench.result import Figures, Result, add_json, command, print_table

TINY = PhiConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, eos_token_id=2
)
PROFILED_STEPS = 4


def points(text: str) -> list[tuple[int, int]]:
    """Batches and contexts of ``1x16k,64x4k`` (k is 1,024)."""
    pairs = [part.split("x") for part in text.split(",") if part]
    return [(int(b), int(c[:-1]) * 1024 if c.endswith("k") else int(c)) for b, c in pairs]


def settings(given: argparse.Namespace) -> BenchSettings:
    """What the meter goes by; the points are given to it one by one."""
    dtype: Any = "float32" if given.small else "bfloat16"
    return BenchSettings((), (), (), given.new_tokens, given.repeats, dtype)


def measured(contestant: Contestant, given: argparse.Namespace, bandwidth: float) -> dict[str, Figures]:
    """All points of one model, and its profile."""
    device = torch.device("cpu" if given.small else "cuda")
    how = settings(given)
    model = contestant.load(getattr(torch, how.dtype), device)
    meter = Meter(contestant.who, model, footprint(model), how, bandwidth, memory_of(device))
    found = {}
    for engine, places in (("decant", given.points), ("generate", given.generate)):
        for batch, context in places:
            point = meter.point(engine, batch, context)
            found[f"{contestant.who} {batch}x{context} {engine}"] = _figures(point)
            print_table({f"{contestant.who} {batch}x{context} {engine}": _figures(point)})
    if given.profile:
        for batch, context in given.points:
            _profile(model, batch, context, given.profile / f"{contestant.who}-{batch}x{context}.txt")
    del model, meter
    free(device)
    return found


def _figures(point: dict[str, Any]) -> Figures:
    peak, seconds, steps = point["peak_bytes"], point["seconds"], point["new_tokens"] - 1
    return {
        "tokens/s": point["tokens_per_second"],
        "ms a step": 1000 * seconds / steps if seconds else None,
        "roofline, tokens/s": point["roofline_tokens_per_second"],
        "of the roofline": point["roofline_share"],
        "first token, s": point["seconds_to_first_token"],
        "peak GB": peak / 1e9 if peak else None,
        "formula GB": point["formula_bytes"] / 1e9,
        "peak over formula": peak / point["formula_bytes"] if peak else None,
        "reason": point["reason"],
    }


def _profile(model: PreTrainedModel, batch: int, context: int, file: Path) -> None:
    """Writes what the device does in a step at the end of such prompts."""
    told = _steps_told(model, {"input_ids": random_prompts(model, batch, context, 0)})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(told)
    free(model.device)


def _steps_told(model: PreTrainedModel, prompts: dict[str, Tensor]) -> str:
    """Some steps' kernels, as text; the engine and its room end here."""
    with closing(DecodingEngine(model).tokens(prompts, 2 + PROFILED_STEPS)) as tokens:
        next(tokens)
        return describe(recorded_kernels(lambda: [next(tokens) for _ in range(PROFILED_STEPS)]), PROFILED_STEPS)


def ratios(sides: dict[str, Figures]) -> dict[str, float]:
    """Shares of rooflines, the student's gain, the engine's, and memory over the formula."""
    found: dict[str, float] = {}
    for name, figures in sides.items():
        who, place, engine = name.split()
        for ratio in ("of the roofline", "peak over formula"):
            if engine == "decant" and isinstance(value := figures[ratio], float):
                found[f"{who} {place}: {ratio}"] = value
        base = f"teacher {place} {engine}" if who == "student" else None
        pairs = [(base, f"{place}: student over teacher, {engine}")]
        pairs += [(f"{who} {place} generate", f"{who} {place}: engine over generate()")] if engine == "decant" else []
        for other, told in pairs:
            if other in sides and isinstance(top := figures["tokens/s"], float):
                below = sides[other]["tokens/s"]
                found |= {told: top / below} if isinstance(below, float) else {}
                allowed = [f["roofline, tokens/s"] for f in (figures, sides[other])]
                if "student over" in told and all(isinstance(a, float) for a in allowed):
                    found[f"{place}: rooflines allow"] = allowed[0] / allowed[1]  # type: ignore[operator]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table of all points, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--points", type=points, help="BATCHxCONTEXT,... (1x16k,16x4k,64x4k,1x64k)")
    parser.add_argument("--generate", type=points, help="where transformers' generate() is measured too (1x1100)")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the layers that is replaced")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", type=Path, help="a folder for each point's kernels")
    add_json(parser)
    given = parser.parse_args(arguments)
    usual = ("1x12,3x8", "1x12") if given.small else ("1x1100,1x16k,16x4k,64x4k,1x64k", "1x1100")
    given.points, given.generate = (a or points(u) for a, u in zip((given.points, given.generate), usual, strict=True))
    device = torch.device("cpu" if given.small else "cuda")
    bandwidth = copy_bandwidth(device, 2**24 if given.small else None).median
    free(device)
    gc.freeze()  # what is here stays: looking through it before each run would take the time
    if given.small:
        contestants = drawn(TINY, LayersConfig(ratio=given.ratio), "mimic", "auto", 0)
    else:
        contestants = of_folders("phi-2", None, given.ratio, 0, random=True)
    sides: dict[str, Figures] = {}
    for contestant in contestants:
        sides |= measured(contestant, given, bandwidth)
    gc.unfreeze()
    found = ratios(sides)
    print(f"\ncopies move {bandwidth / 1e12:.3g} TB/s\n")
    print_table(sides)
    print("\n| ratio | |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:.3f} |")
    Result("decode", command("decode", arguments), sides, found).write(given.json)


if __name__ == "__main__":
    main()
