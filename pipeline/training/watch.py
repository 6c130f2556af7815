"""What is known of a training while it runs: metrics summed over steps and workers, speed, waiting, padding, memory."""

import resource
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.training.batch import Batch
from pipeline.training.engine import Worker


class Window:
    """One worker's sums over the steps since the last log entry."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.sums = worker, dict[str, Tensor]()
        self.steps = self.tap_steps = self.tokens = self.padding = 0
        self.waited, self.started = 0.0, time.monotonic()

    def wait(self, seconds: float) -> None:
        """Counts time in which the worker had no data."""
        self.waited += seconds

    def micro_batch(self, batch: Batch, metrics: dict[str, Tensor]) -> None:
        """Adds one micro-batch."""
        self.tokens, self.padding = self.tokens + batch.tokens, self.padding + batch.padding
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().float()

    def step(self, batch: Batch, norm: float) -> None:
        """Ends a step with its last micro-batch."""
        self.steps += 1
        self.tap_steps += batch.totals.tapped > 0
        self.sums["grad_norm"] = self.sums.get("grad_norm", 0.0) + torch.tensor(norm)

    def entry(self, names: list[str]) -> dict[str, Any]:
        """Means over the steps, of what the workers measured together; a collective call with the same names.

        A worker may lack a metric (no row with taps): then it adds nothing to the sum.
        """
        device = self.worker.device
        seconds = time.monotonic() - self.started
        zero = torch.zeros((), device=device)
        measured = [self.sums.get(n, zero) / self._divisor(n) for n in names]
        own = torch.tensor([self.tokens, self.padding, self.waited / seconds / self.worker.world], device=device)
        values = torch.cat([torch.stack(measured).double(), own.double()])
        memory = torch.tensor(float(memory_bytes(device)), device=device, dtype=torch.float64)
        if self.worker.world > 1:
            dist.all_reduce(values)
            dist.all_reduce(memory, dist.ReduceOp.MAX)
        *means, tokens, padding, waiting = values.tolist()
        return {
            **{n: round(v, 6) for n, v in zip(names, means, strict=True)},
            "grad_norm": round(float(self.sums["grad_norm"] / self.steps), 6),
            "steps_per_second": round(self.steps / seconds, 3),
            "tokens_per_second": round(tokens / seconds, 1),
            "padding_share": round(padding / (tokens + padding), 4),
            "waiting_share": round(waiting, 4),
            "memory_bytes": int(memory),
            "workers": self.worker.world,
        }

    def _divisor(self, name: str) -> int:
        """The number of steps that the metric was measured in."""
        return max(1, self.tap_steps if name.startswith("layer_") else self.steps)


# Entries of the log that say how, and how fast, it went; all others are the same in every run.
SPEED = ("steps_per_second", "tokens_per_second", "waiting_share", "memory_bytes", "workers")


def memory_bytes(device: torch.device) -> int:
    """The most that this process has held: on the device, or in main memory where that is the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
