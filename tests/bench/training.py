"""A training step three ways, at TinyLLaVA-Phi-2's size: ``python -m tests.bench.training`` on a GPU.

Random weights, a quarter of the layers replaced, 8 samples of 1,024 tokens of which 728 are an image's and the last 200
have targets. ``cached`` is the training loop's step from a batch on the host, with pixels or with cached features of
the vision tower; ``online`` runs the teacher in the same process and computes those very targets and taps, so that its
loss must be the same but for rounding; ``reference`` is as MaTVLM's loop does it. All take turns in one run, and get
their batches in the same way. For cached and online, frozen layers of both models are compiled and the vision tower is
replayed as a graph, as in training (``--eager``: not); never for reference, whose authors run it so. A round is five
steps, over which the tapped samples come out whole (2 of 40); figures are medians of rounds, rates count image
positions as tokens. Beside them stand two floors (``floor``) and what the FLOPs imply. ``--small`` is for a machine
without a GPU, to see that it runs.
"""

import argparse
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models import body
from pipeline.roofline import settled
from pipeline.surgery import DEFAULT_PARTS
from pipeline.training.batch import Batch, Copier, Sent
from pipeline.training.engine import Worker
from pipeline.vision import feed_features
from schemas.layers import Placement
from tests.bench.floor import Parts, Products, milliseconds
from tests.bench.kernels import describe, noted_waits, recorded_kernels
from tests.bench.online import OnlineStep, ReferenceStep
from tests.bench.pair import Pair, add_sizes, sizes_of
from tests.bench.result import Result, add_json, command

STEPS, ROUNDS, REFERENCE_ROUNDS = 5, 5, 1
# Threads that copy batches to the device, as in placement.distill.readers.
READERS = 2
Step = Callable[[Batch], Tensor]
# Of each side a row a round: milliseconds a step, peak bytes, loss.
Found = dict[str, list[tuple[float, ...]]]


class Clock:
    """Time by what it was spent on: from each mark to the next, by the device's own clock where it has one."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """From here on the time is ``name``'s."""
        now: Any = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda:
            now.record()
        self.marks.append((name, now))

    def spans(self) -> dict[str, float]:
        """Milliseconds by name, in the order of their first marks."""
        found: dict[str, float] = {}
        if self.cuda:
            torch.cuda.synchronize()
        for (name, begin), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            spent = begin.elapsed_time(end) if self.cuda else 1000 * (end - begin)
            found[name] = found.get(name, 0.0) + spent
        return found

    def within(self, module: nn.Module, name: str, after: str) -> None:
        """From now on the module's forward is ``name``'s, and what comes then ``after``'s."""
        module.register_forward_pre_hook(lambda *_: self.mark(name))
        module.register_forward_hook(lambda *_: self.mark(after))


class CachedStep:
    """The training loop's own step; from the tower's features where the batch has those, in place of pixels."""

    def __init__(self, pair: Pair, *, features: bool = False) -> None:
        self.pair, inner = pair, body(pair.student)
        self.tower = inner.vision_tower
        if features:
            feed_features(pair.student)
            self.tower, inner.vision_tower = inner.vision_tower, self.tower

    def __call__(self, batch: Batch, mark: Callable[[str], None] = lambda _: None) -> Tensor:
        """The loss, after the update; says what is next before each part."""
        inner = body(self.pair.student)
        own, inner.vision_tower = inner.vision_tower, self.tower
        mark("forward and backward")
        metrics = self.pair.engine.accumulate(batch, last=True)
        mark("clip and optimizer")
        self.pair.engine.step(0.0)
        mark("end")
        inner.vision_tower = own
        return metrics["loss"]


def fed(device: torch.device, batches: Sequence[Batch]) -> Iterator[Batch]:
    """The batches on the device, copied as the training loop does: from pinned memory, while the device computes."""
    copier, waiting = Copier(device), deque[Future[Sent]]()
    with ThreadPoolExecutor(READERS) as pool:
        for batch in batches:
            waiting.append(pool.submit(copier.send, batch))
            if len(waiting) > READERS:
                yield copier.receive(waiting.popleft().result())
        while waiting:
            yield copier.receive(waiting.popleft().result())


def raw_batches(pair: Pair, share: float, steps: int) -> list[Batch]:
    """The batches of a round, without the teacher's part; ``share`` of all their samples are tapped."""
    ends = np.floor(np.arange(steps + 1) * pair.sizes.batch * share + 1e-9).astype(int)
    return [pair.draw_batch(int(n), seed) for seed, n in enumerate(np.diff(ends))]


def cached_batches(pair: Pair, raw: Sequence[Batch], *, features: bool = False) -> list[Batch]:
    """What the cache would give for them, on the host; with ``features`` in the place of pixels."""
    online, made = OnlineStep(pair), []
    for batch in raw:
        there = pair.moved(batch)
        seen = online.features(there)
        known = online.answered(there, seen)
        if features and seen is not None:
            known = replace(known, inputs={**known.inputs, "pixel_values": seen})
        known = known.map(lambda tensor: tensor.cpu())
        if pair.device.type == "cuda":
            torch.cuda.synchronize()
        made.append(known)
    return made


def counted(step: Step, batches: Sequence[Batch]) -> float:
    """FLOPs of a step: products and attention, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        for batch in batches:
            step(batch)
    return counter.get_total_flops() / len(batches)


def timed(pair: Pair, step: Step, batches: Sequence[Batch]) -> tuple[float, float, float]:
    """Milliseconds a step, peak bytes on the device, and the mean loss."""
    cuda = pair.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    started = settled(pair.device)
    losses = [step(batch) for batch in fed(pair.device, batches)]
    loss = float(torch.stack(losses).mean())  # waits for the device
    spent = 1000 * (settled(pair.device) - started) / len(batches)
    return spent, float(torch.cuda.max_memory_allocated()) if cuda else float("nan"), loss


def measure(pair: Pair, works: dict[str, tuple[Step, list[Batch]]], rounds: int) -> Found:
    """All sides in turns; the first round warms up."""
    found: Found = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, (step, batches) in works.items():
            if name == "reference" and number > REFERENCE_ROUNDS:
                continue  # which takes as long as all others together
            found[name].append(timed(pair, step, batches))
            spent, peak, loss = found[name][-1]
            print(f"{name}: {spent:,.1f} ms a step, {peak / 1e9:.1f} GB, loss {loss:.4f}", file=sys.stderr, flush=True)
    return {name: values[1:] for name, values in found.items()}


def floors(pair: Pair, products: Products, steps: int, rounds: int) -> tuple[dict[str, float], float]:
    """Milliseconds of a step's parts, and of its products; these were noted over ``steps``."""
    parts = {name: milliseconds(work, pair.device, rounds) for name, work in Parts(pair).calls().items()}
    return parts, milliseconds(products, pair.device, rounds) / steps


def figures(
    pair: Pair, flops: dict[str, float], found: Found, parts: dict[str, float], products: float
) -> dict[str, Any]:
    """All that was measured, and the ratios that count."""
    sides = {}
    for name, values in found.items():
        rates = [1000 * pair.sizes.a_step / v[0] for v in values]
        sides[name] = {
            "ms": statistics.median(v[0] for v in values),
            "tokens_per_second": [min(rates), statistics.median(rates), max(rates)],
            "tflop": flops[name] / 1e12,
            "peak_gb": _peak(pair, name, values),
            "loss": values[-1][2],
        }
    spent = {name: side["ms"] for name, side in sides.items()}
    return {
        "sides": sides,
        "parts_ms": parts,
        "products_ms": products,
        "ratios": {
            "cached over online": spent["online"] / spent["cached"],
            "cached over reference": spent["reference"] / spent["cached"],
            "FLOPs of online over cached": flops["online"] / flops["cached"],
            "FLOPs of reference over cached": flops["reference"] / flops["cached"],
            "step over parts alone": spent["cached"] / sum(parts.values()),
            "step over products alone": spent["cached"] / products,
        },
    }


def result(made: dict[str, Any], line: str) -> Result:
    """The figures in the form of all benchmarks; what the sides are is in the command ``line``."""
    sides: dict[str, Any] = {}
    for name, side in made["sides"].items():
        slowest, middle, fastest = side["tokens_per_second"]
        rates = {"tokens/s": middle, "slowest": slowest, "fastest": fastest}
        sides[name] = rates | {key: value for key, value in side.items() if key != "tokens_per_second"}
    sides |= {f"alone: {name}": {"ms": spent} for name, spent in made["parts_ms"].items()}
    sides["products alone"] = {"ms": made["products_ms"]}
    return Result("training", line, sides, made["ratios"], "products alone")


def _peak(pair: Pair, name: str, values: list[tuple[float, ...]]) -> float | None:
    """GB; cached without what only the teacher has, and None without a device of its own."""
    if pair.device.type != "cuda":
        return None
    return (max(v[1] for v in values) - (pair.spare if name.startswith("cached") else 0)) / 1e9


def print_table(pair: Pair, made: dict[str, Any]) -> None:
    """Speed, arithmetic and memory of the sides, and the floors."""
    sides = made["sides"]
    print("| | tokens/s (range) | ms a step | of online | of reference | TFLOP a step | TFLOP/s | peak GB | loss |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, side in sides.items():
        least, middle, most = side["tokens_per_second"]
        cells = [
            f"{middle:,.0f} ({least:,.0f}–{most:,.0f})",
            f"{side['ms']:,.1f}",
            f"{sides['online']['ms'] / side['ms']:.2f}",
            f"{sides['reference']['ms'] / side['ms']:.2f}",
            f"{side['tflop']:.3g}",
            f"{1000 * side['tflop'] / side['ms']:.3g}",
            f"{side['peak_gb']:.1f}" if side["peak_gb"] else "–",
            f"{side['loss']:.4f}",
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    ratios = made["ratios"]
    print(
        f"\nThe FLOPs allow cached {ratios['FLOPs of online over cached']:.2f} times online's speed and "
        f"{ratios['FLOPs of reference over cached']:.2f} times reference's. Online and reference share the frozen "
        f"weights with the teacher here; a teacher of its own adds {pair.shared / 1e9:.1f} GB to their peaks. Cached "
        f"is given without the {pair.spare / 1e9:.2f} GB that only the teacher has. Mixers by {pair.ops.backend}."
    )
    print("\n| floor of a step | ms |\n|---|---|")
    for name, spent in made["parts_ms"].items():
        print(f"| {name} | {spent:,.1f} |")
    print(
        f"| these parts alone | {sum(made['parts_ms'].values()):,.1f} (step: {ratios['step over parts alone']:.2f}) |"
    )
    print(f"| products alone | {made['products_ms']:,.1f} (step: {ratios['step over products alone']:.2f}) |")


def print_parts(pair: Pair, step: CachedStep, batches: Sequence[Batch]) -> None:
    """What a cached step's time goes into; the last that is done with the pair, which keeps the hooks."""
    clock, inner = Clock(pair.device), body(pair.student)
    clock.within(inner, "body, forward", "head and its losses")
    clock.within(inner.vision_tower, "vision tower", "body, forward")
    clock.within(pair.objective.layer, "layer loss", "head and its losses")
    pair.objective.register_forward_hook(lambda *_: clock.mark("backward"))
    for batch in fed(pair.device, batches):
        step(batch, clock.mark)
    spans = clock.spans()
    spans.pop("end", None)  # between steps
    whole = sum(spans.values())
    print("\n| part of a cached step | ms | share |\n|---|---|---|")
    for name, value in spans.items():
        print(f"| {name} | {value / len(batches):,.1f} | {100 * value / whole:.0f} % |")


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_sizes(parser)
    parser.add_argument("--layers", choices=get_args(Placement), default="even", help="which quarter is replaced")
    parser.add_argument(
        "--train", choices=("all", "mixers"), default="all", help="mixers and connector, or those alone"
    )
    parser.add_argument("--tapped", type=float, default=0.05, help="share of the samples with taps")
    parser.add_argument("--steps", type=int, default=STEPS, help="a round")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--checkpointing", action="store_true", help="cached and online checkpoint stock layers, too")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--profile", type=Path, help="where to write a cached step's kernels and gaps (on a GPU)")
    parser.add_argument("--syncs", action="store_true", help="list where a cached step makes the host wait (on a GPU)")
    add_json(parser)
    return parser.parse_args(given)


def main(arguments_given: Sequence[str] | None = None) -> None:
    """Prints the tables."""
    given = arguments(arguments_given)
    device = torch.device("cpu" if given.small else "cuda")
    parts: Any = DEFAULT_PARTS if given.train == "all" else ("mixers",)
    pair = Pair(sizes_of(given), Worker(0, 1, device), given.layers, parts)
    raw = raw_batches(pair, given.tapped, given.steps)

    def kept(step: Step) -> Step:
        def run(batch: Batch) -> Tensor:
            with pair.checkpointed() if given.checkpointing else nullcontext():
                return step(batch)

        return run

    mine, by_reference = CachedStep(pair), ReferenceStep(pair)

    def eager(batch: Batch) -> Tensor:
        with pair.eager():
            return by_reference(batch)

    works = {"cached": (kept(mine), cached := cached_batches(pair, raw))}
    if pair.sizes.image:
        features = cached_batches(pair, raw, features=True)
        works["cached, with vision features"] = (kept(CachedStep(pair, features=True)), features)
    works |= {"online": (kept(OnlineStep(pair)), raw), "reference": (eager, raw)}
    # before anything is compiled, into which neither counting nor noting sees
    flops = {name: counted(step, [pair.moved(b) for b in batches]) for name, (step, batches) in works.items()}
    with Products() as products:
        for batch in cached:
            mine(pair.moved(batch))
    if not given.eager:
        pair.compile()
    found = measure(pair, works, given.rounds)
    made = figures(pair, flops, found, *floors(pair, products, given.steps, given.rounds))
    print_table(pair, made)
    result(made, command("training", arguments_given)).write(given.json)
    look_closer(pair, kept(mine), cached, given)
    with pair.checkpointed() if given.checkpointing else nullcontext():
        print_parts(pair, mine, cached)


def look_closer(pair: Pair, step: Step, batches: Sequence[Batch], given: argparse.Namespace) -> None:
    """What ``--profile`` and ``--syncs`` ask for, of steps without taps, as most are."""
    plain = [pair.moved(batch) for batch in batches if not batch.totals.tapped]
    if given.profile:
        given.profile.write_text(describe(recorded_kernels(lambda: [step(batch) for batch in plain]), len(plain)))
        print(f"\nkernels of {len(plain)} steps: {given.profile}")
    if given.syncs:
        with noted_waits() as waits:
            step(plain[0])
        print("\nThe host waits for the device in one step:")
        for where, times in waits.most_common():
            print(f"* {times} × {where}")


if __name__ == "__main__":
    main()
