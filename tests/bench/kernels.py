"""What a device did in a step: its kernels by kind, and the gaps between them; and where the host waited for it."""

import linecache
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# The first pattern that a kernel's name matches names its kind.
KINDS = {
    "attention": r"flash|fmha|attention|sdpa|attend_splits|combine_splits",
    "scan": r"_chunk_|chunk_cumsum|state_passing|mix_heads|selective",
    "convolution": r"conv1d|conv2d|im2col|implicit",
    "products": r"gemm|cutlass|nvjet|xmma|cublas|splitk|wgrad|dgrad|project_row|reduce_row",
    "norms": r"norm|rsqrt",
    "optimizer": r"adam|multi_tensor",
    "copies": r"memcpy|memset|copy|fillfunctor",
}
REST, LONGEST, NAME, FRAMES = "element-wise and sums", 10, 100, 4
# What torch says of an operation that made the host wait.
SYNCHRONIZES = "synchronizing"


@dataclass(frozen=True)
class Kernel:
    """One piece of work on the device, in microseconds of the profiler's clock."""

    name: str
    begin: float
    end: float

    @property
    def kind(self) -> str:
        """What it is counted as."""
        return next((kind for kind, names in KINDS.items() if re.search(names, self.name, re.IGNORECASE)), REST)


def recorded_kernels(work: Callable[[], object]) -> list[Kernel]:
    """What the device did while ``work`` ran, in the order of its beginnings."""
    # without the host's side, whose recording would hold the host up and lengthen the gaps
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize()
    events: Any = found.events()
    kernels = [
        Kernel(e.name, e.time_range.start, e.time_range.end)
        for e in events
        if e.device_type == torch.autograd.DeviceType.CUDA and e.time_range.end > e.time_range.start
    ]
    return sorted(kernels, key=lambda k: k.begin)


def gaps(kernels: Sequence[Kernel]) -> list[tuple[float, Kernel, Kernel]]:
    """Microseconds in which nothing ran, with what ran before and after; the longest first."""
    found, last = [], None
    for kernel in kernels:
        if last is not None and kernel.begin > last.end:
            found.append((kernel.begin - last.end, last, kernel))
        if last is None or kernel.end > last.end:
            last = kernel
    return sorted(found, key=lambda gap: -gap[0])


def describe(kernels: Sequence[Kernel], steps: int) -> str:
    """Milliseconds a step by kind, the largest kernels, and the gaps."""
    kinds, names, counts = Counter[str](), Counter[str](), Counter[str]()
    for kernel in kernels:
        kinds[kernel.kind] += kernel.end - kernel.begin  # type: ignore[assignment]
        names[kernel.name] += kernel.end - kernel.begin  # type: ignore[assignment]
        counts[kernel.name] += 1
    empty = gaps(kernels)
    whole = max(k.end for k in kernels) - min(k.begin for k in kernels)
    scale = 1 / 1000 / steps
    lines = [f"{whole * scale:8.2f} ms a step, {sum(kinds.values()) * scale:.2f} of them kernels"]
    lines += [f"{spent * scale:8.2f} ms {kind}" for kind, spent in kinds.most_common()]
    lines += [f"{sum(gap for gap, *_ in empty) * scale:8.2f} ms in {len(empty) / steps:.0f} gaps; the longest:"]
    lines += [f"{gap / 1000:8.3f} ms {b.name[:NAME]} | {a.name[:NAME]}" for gap, b, a in empty[:LONGEST]]
    lines += ["kernels, ms and calls a step:"]
    top = names.most_common(3 * LONGEST)
    return "\n".join(lines + [f"{t * scale:8.2f} ms {counts[n] / steps:6.0f} {n[:NAME]}" for n, t in top]) + "\n"


@contextmanager
def noted_waits() -> Iterator[Counter[str]]:
    """While open, every operation after which the host waits for the device is counted, with the calls that led to it.

    Only torch's own are seen. In backward passes, which run in threads of their own, there may be no calls to show.
    """
    found = Counter[str]()

    def note(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        if SYNCHRONIZES not in str(message):
            return
        frames = [f for f in traceback.extract_stack()[:-1] if "warnings.py" not in f.filename]
        lines = [
            f"{_short(f.filename)}:{f.lineno} {linecache.getline(f.filename, f.lineno or 0).strip()}" for f in frames
        ]
        found[" < ".join(reversed(lines[-FRAMES:])) or f"{_short(filename)}:{lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _short(path: str) -> str:
    return "/".join(path.split("/")[-2:])
