"""One Phi-2 mixer's forward and backward on a CUDA device: each backend, in turns within one run, beside the floor.

``python -m tests.bench.mixer [BATCH LENGTH]``. The floor is the matrix products of the two projections alone.
"""

import sys
from collections.abc import Callable
from dataclasses import replace

import torch

from pipeline.mixer import Mamba2Mixer
from pipeline.ops.backends import resolve
from pipeline.ops.opset import TORCH
from schemas.hybrid import MixerDims

ROUNDS, REPEATS = 5, 10


def milliseconds(step: Callable[[], None]) -> float:
    """Mean time of a step over the repeats, measured by the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(REPEATS):
        step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / REPEATS


def main(batch: int, length: int) -> None:
    """Prints the median of the rounds for each side and its ratio to the floor."""
    cuda = torch.device("cuda")
    torch.manual_seed(0)
    with cuda:
        mixer = Mamba2Mixer(MixerDims(hidden=2560, heads=32, kv_heads=32, head_dim=80, bias=False), 0)
        mixer.to(torch.bfloat16)
        u = torch.randn(batch, length, 2560, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(batch, length, 2560, dtype=torch.bfloat16)
    kernels = resolve("mamba-ssm", cuda)
    sides = {"torch": TORCH, "mamba-ssm, separate": replace(kernels, fused=None), "mamba-ssm, fused": kernels}

    def run(ops: object) -> Callable[[], None]:
        def step() -> None:
            mixer.use(ops)  # type: ignore[arg-type]
            mixer(u)[0].backward(weight)

        return step

    def products() -> None:
        inner = mixer.in_proj(u)[..., : mixer.dims.inner]
        mixer.out_proj(inner).backward(weight)

    steps = {"floor": products, **{name: run(ops) for name, ops in sides.items()}}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(ROUNDS + 1):
        for name, step in steps.items():
            value = milliseconds(step)
            print(f"round {round_}: {name} {value:.2f} ms", file=sys.stderr, flush=True)
            if round_:  # the first compiles and warms up
                times[name].append(value)
    mixer.use(TORCH)
    plain = mixer(u)[0].detach()
    for name, ops in sides.items():
        mixer.use(ops)
        difference = float((mixer(u)[0].detach() - plain).float().norm() / plain.float().norm())
        print(f"{name}: output differs from torch's by {difference:.1e} of its norm")
    floor = sorted(times["floor"])[ROUNDS // 2]
    print(f"{torch.cuda.get_device_name()}, {batch} x {length} tokens, bfloat16, forward and backward")
    for name, values in times.items():
        median = sorted(values)[ROUNDS // 2]
        print(f"{name:22s} {median:8.2f} ms  {median / floor:6.2f} x floor")


if __name__ == "__main__":
    main(*(map(int, sys.argv[1:]) if len(sys.argv) > 1 else (8, 1024)))
