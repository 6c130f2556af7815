"""One Phi-2 mixer's forward and backward: each backend and chunk of the scan, in turns within one run, beside a floor.

``python -m tests.bench.mixer [BATCH LENGTH] --chunks 64 128 256`` on a CUDA device; ``--small`` is for machines without
one, to see that it runs. Weights are float32 under autocast, as they train. The floor is the matrix products of the two
projections alone.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pipeline.mixer import Mamba2Mixer
from pipeline.ops.backends import CHUNK, mamba_ssm
from pipeline.ops.opset import TORCH, OpSet
from schemas.hybrid import MixerDims
from tests.bench.floor import milliseconds
from tests.bench.kernels import describe, recorded_kernels
from tests.bench.result import Result, add_json, command

ROUNDS, REPEATS = 5, 10
PHI2 = MixerDims(hidden=2560, heads=32, kv_heads=32, head_dim=80, bias=False)
TINY = MixerDims(hidden=32, heads=4, kv_heads=4, head_dim=8, bias=False)


class Bench:
    """A mixer, its input [B, L, D] in bfloat16 and the gradient of its output."""

    def __init__(self, batch: int, length: int, dims: MixerDims, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        with device:
            self.mixer = Mamba2Mixer(dims, 0)
            self.u, self.gradient = (torch.randn(batch, length, dims.hidden, dtype=torch.bfloat16) for _ in range(2))
        self.u.requires_grad_()

    def step(self, ops: OpSet) -> None:
        """Forward and backward; gradients add up."""
        self.output(ops).backward(self.gradient)

    def output(self, ops: OpSet) -> Tensor:
        """The mixer's output in bfloat16."""
        self.mixer.use(ops)
        with torch.autocast(self.device.type, torch.bfloat16):
            out: Tensor = self.mixer(self.u)[0]
        return out.to(self.u.dtype)

    def products(self) -> None:
        """The floor."""
        mixer = self.mixer
        with torch.autocast(self.device.type, torch.bfloat16):
            out = mixer.out_proj(mixer.in_proj(self.u)[..., : mixer.dims.inner])
        out.to(self.u.dtype).backward(self.gradient)


def sides_of(device: torch.device, chunks: Sequence[int]) -> dict[str, OpSet]:
    """What is compared, by name."""
    if device.type != "cuda":
        return {"torch": TORCH}
    sides = {"torch": TORCH}
    for chunk in chunks:
        made = mamba_ssm(device, chunk)
        sides |= {f"fused, chunks of {chunk}": made, f"separate, chunks of {chunk}": replace(made, fused=None)}
    return sides


def measure(bench: Bench, sides: dict[str, OpSet], rounds: int) -> dict[str, float]:
    """Milliseconds of a step: medians of the rounds, in which the sides take turns."""

    def repeated(step: Callable[[], None]) -> Callable[[], None]:
        return lambda: [step() for _ in range(REPEATS)] and None

    steps = {"floor": repeated(bench.products)}
    steps |= {name: repeated(lambda ops=ops: bench.step(ops)) for name, ops in sides.items()}  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name, step in steps.items():
            times[name].append(milliseconds(step, bench.device, 1) / REPEATS)
            print(f"round {number}: {name} {times[name][-1]:.2f} ms", file=sys.stderr, flush=True)
    return {name: statistics.median(values) for name, values in times.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the median of the rounds for each side and its ratio to the floor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", type=int, nargs="*", metavar="BATCH LENGTH", help="8 1024 (small: 2 40)")
    parser.add_argument(
        "--chunks", type=int, nargs="+", default=[CHUNK], help="tokens that the fused scan takes at once"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--small", action="store_true", help="a tiny mixer on the CPU, to see that it runs")
    parser.add_argument("--profile", type=Path, help="where to write the last side's kernels (on a GPU)")
    add_json(parser)
    given = parser.parse_args(arguments)
    device = torch.device("cpu" if given.small else "cuda")
    batch, length = given.sizes or ((2, 40) if given.small else (8, 1024))
    bench, sides = Bench(batch, length, TINY if given.small else PHI2, device), sides_of(device, given.chunks)
    spent = measure(bench, sides, given.rounds)
    ratios = {name: value / spent["floor"] for name, value in spent.items()}
    with torch.no_grad():
        plain = bench.output(TORCH).float()
        errors = {n: float((bench.output(ops).float() - plain).norm() / plain.norm()) for n, ops in sides.items()}
    print(f"{batch} x {length} tokens on {device}, bfloat16, forward and backward")
    for name, value in spent.items():
        error = f", output differs from torch's by {errors[name]:.1e} of its norm" if name in errors else ""
        print(f"{name:32s} {value:8.2f} ms  {ratios[name]:6.2f} x floor{error}")
    found = {name: {"ms": value, "error": errors.get(name)} for name, value in spent.items()}
    told = {f"{name} / floor": value for name, value in ratios.items() if name != "floor"}
    Result("mixer", command("mixer", arguments), found, told, "floor").write(given.json)
    if given.profile:
        last = list(sides.values())[-1]
        given.profile.write_text(describe(recorded_kernels(lambda: bench.step(last)), 1))


if __name__ == "__main__":
    main()
