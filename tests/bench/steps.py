"""A decoding step's kernels on a CUDA device: microseconds and share of the measured copy bandwidth, torch beside them.

``python -m tests.bench.steps [--only PATTERN] [--tune] [--json FILE]``; ``--small`` runs plain torch on the CPU, to be
runnable. Every operation is checked against plain torch first. A measurement is one CUDA graph that goes over enough
copies of weights and caches (1 GB) to find none of them in the device's cache; the median of several replays counts.
``--tune`` measures other tiles than the modules' constants too.
"""

import argparse
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from pipeline.ops.stepping import PLAIN, StepOps
from pipeline.roofline import copy_bandwidth
from tests.bench.result import Figures, Result, add_json, command
from tests.bench.step_cases import GROUPED, PHI, SMALL, SMALL_GROUPED, Case, Maker, cases

# Bytes that a graph goes over: many times any device's cache.
BEYOND_CACHE = 2**30
REPLAYS, WARMUPS = 11, 3
# bfloat16 results of two groupings of the same sums, as a share of the norm; a chain adds up what its layers differ by.
NEAR, CHAIN_NEAR = 1e-2, 5e-2


def microseconds(runs: Sequence[Callable[[], Any]]) -> float:
    """Of one of the runs, all captured in one graph: the median over replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            runs[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run() for run in runs]  # noqa: F841 - outputs stay apart, as in a model's graph
    times = []
    for replay in range(WARMUPS + REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= WARMUPS:
            times.append(begin.elapsed_time(end))
    return statistics.median(times) * 1e3 / len(runs)


def check(case: Case, ops: StepOps) -> float:
    """How far the kernels are from plain torch, as a share of the norm: the greatest of outputs and states."""
    saved = [t.clone() for t in case.states]
    expected = case.run(PLAIN) + [t.clone() for t in case.states]
    for tensor, value in zip(case.states, saved, strict=True):
        tensor.copy_(value)
    got = case.run(ops) + list(case.states)
    errors = [float((g.float() - e.float()).norm() / e.float().norm()) for g, e in zip(got, expected, strict=True)]
    return max(errors) if all(e == e for e in errors) else float("nan")


def copies(make: Maker, build: Callable[[Maker], Case]) -> list[Case]:
    """The case on enough tensors of its own that a graph over all of them leaves the cache."""
    first = build(make)
    return [first, *(build(make) for _ in range(max(1, BEYOND_CACHE // first.moved)))]


class Table:
    """Rows as they come, on the screen and in the end as JSON; remembers what was wrong."""

    def __init__(self, bandwidth: float) -> None:
        self.bandwidth, self.wrong = bandwidth, list[str]()
        self.sides: dict[str, Figures] = {}
        print(f"{'operation':44s} {'by':22s} {'us':>9s} {'ideal':>8s} {'GB/s':>7s} {'share':>6s} {'error':>8s}")

    def add(self, name: str, by: str, us: float, moved: int, error: float | None = None) -> None:
        rate, ideal = moved / us * 1e-3, moved / self.bandwidth * 1e6
        told = "" if error is None else f"{error:8.1e}"
        share = ideal / us
        print(f"{name:44s} {by:22s} {us:9.2f} {ideal:8.2f} {rate:7.0f} {share:6.3f} {told}", flush=True)
        self.sides[f"{name}, {by}"] = {"us": us, "floor us": ideal, "floor / us": share, "error": error}
        if error is not None and not error <= (CHAIN_NEAR if "layers" in name else NEAR):
            self.wrong.append(name)

    def ratios(self) -> dict[str, float]:
        """The floor's share of each time."""
        return {name: float(figures["floor / us"]) for name, figures in self.sides.items()}  # type: ignore[arg-type]


def variants() -> dict[str, StepOps]:
    from pipeline.ops import step_kernels

    return {"kernels, early start": step_kernels.kernels(True), "kernels": step_kernels.kernels(False)}


def measure(table: Table, name: str, made: list[Case], by: str, ops: StepOps) -> None:
    error = check(made[0], ops)
    table.add(name, by, microseconds([lambda c=c: c.run(ops) for c in made]), made[0].moved, error)


def all_cases(only: str) -> Iterator[tuple[str, list[Case]]]:
    make = Maker(torch.device("cuda"))
    for name, build, single in cases(PHI, GROUPED, small=False):
        if re.search(only, name):
            yield name, [build(make)] if single else copies(make, build)
            torch.cuda.empty_cache()


def compared(table: Table, only: str) -> None:
    """Every operation and chain by the kernels, with and without early start, and by torch where it can."""
    for name, made in all_cases(only):
        for by, ops in variants().items():
            measure(table, name, made, by, ops)
        if made[0].torch_way is not None:
            table.add(name, "torch", microseconds([c.torch_way for c in made]), made[0].moved)  # type: ignore[misc]


@contextmanager
def set_to(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def tilings(name: str) -> tuple[Any, str, list[Any]]:
    """The module, constant and candidates that decide about an operation's speed."""
    from pipeline.ops import step_attention, step_mixer, step_project, step_reduce

    if "attend" in name:
        grid = [
            (32, 4, 3, 4),
            (64, 4, 2, 3),
            (64, 4, 3, 2),
            (128, 8, 3, 1),
            (32, 2, 3, 4),
            (32, 2, 3, 6),
            (32, 2, 4, 4),
        ]
        grid += [
            (64, 2, 2, 4),
            (64, 2, 3, 2),
            (32, 4, 3, 6),
            (32, 1, 3, 6),
            (16, 1, 4, 8),
            (16, 2, 4, 8),
            (64, 4, 2, 4),
        ]
        constant = "SHORT" if " 1 x 1024" in name else "FEW" if " 1 x " in name else "MANY"
        return step_attention, constant, [step_attention.Tile(*g) for g in grid]
    if " mix " in name:
        return step_mixer, "WARPS", [4, 8, 16]
    module, operation = (step_project, "PROJECT") if "project" in name else (step_reduce, "REDUCE")
    if name.endswith(" 1"):
        constant = f"{operation}_ROW"
        rows = [(2, 1024, 4), (4, 1024, 4), (8, 1024, 4), (4, 512, 2), (8, 512, 2), (16, 512, 2), (4, 2048, 8)]
        rows += [(2, 512, 2), (1, 4096, 4), (2, 4096, 4), (2, 4096, 8), (4, 4096, 8), (4, 2048, 4), (8, 2048, 4)]
        sizes = [(*g, 1) for g in rows]
    else:
        constant = f"{operation}_{'MANY' if name.endswith(' 64') else 'ROWS'}"
        sizes = [(16, 128, 4, 4), (32, 128, 4, 3), (32, 128, 4, 4), (32, 128, 4, 6), (32, 256, 4, 3), (64, 128, 4, 3)]
        sizes += [(64, 64, 4, 4), (64, 64, 4, 5), (16, 256, 4, 4), (128, 64, 4, 4), (128, 64, 8, 3), (16, 128, 2, 6)]
        sizes += [(64, 128, 4, 4)]
    now = getattr(module, constant)
    return module, constant, [replace(now, n=n, k=k, warps=warps, stages=stages) for n, k, warps, stages in sizes]


def tuned(table: Table, only: str) -> None:
    """Every operation with every candidate tile."""
    ops = variants()["kernels, early start"]
    for name, made in all_cases(only):
        if "layers" in name:
            continue
        module, constant, candidates = tilings(name)
        for tile in candidates:
            told = str(tile if isinstance(tile, int) else tuple(vars(tile).values()))
            with set_to(module, constant, tile):
                try:
                    measure(table, name, made, told, ops)
                except Exception as error:  # a tile that the device has no room for is one of the results
                    print(f"{name:44s} {told:22s} {type(error).__name__}: {str(error).splitlines()[0][:60]}")


def small() -> None:
    """Every case by plain torch on the CPU, with small sizes."""
    make = Maker(torch.device("cpu"))
    for name, build, _ in cases(SMALL, SMALL_GROUPED, small=True):
        case = build(make)
        print(f"{name:44s} {case.moved:9d} B  error {check(case, PLAIN):.1e}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table; ends with 1 where a kernel was further from plain torch than its rounding."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="names in which this pattern is found")
    parser.add_argument("--tune", action="store_true", help="other tiles too")
    parser.add_argument("--small", action="store_true", help="plain torch on the CPU")
    add_json(parser)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    if options.small:
        return small()
    device = torch.device("cuda")
    bandwidth = copy_bandwidth(device).median
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copies move {bandwidth / 1e12:.2f} TB/s")
    table = Table(bandwidth)
    with torch.no_grad():
        (tuned if options.tune else compared)(table, options.only)
    Result("steps", command("steps", arguments), table.sides, table.ratios()).write(options.json)
    raise SystemExit(f"too far from plain torch: {sorted(set(table.wrong))}" if table.wrong else 0)


if __name__ == "__main__":
    main()
