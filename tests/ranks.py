"""A group of two ranks to be killed: ``python -m tests.ranks DEVICE work|wait`` says who the second is.

Both work until they end; or the first waits for nothing, and the second for the first.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pipeline.ranks import Ranks


@dataclass(frozen=True)
class Summing:
    """What ranks do in place of a teacher's forwards: add up over all of them, and wait for the sum."""

    device: str

    def __call__(self, rank: int) -> Callable[[Any], object]:
        place = torch.device(self.device, rank) if self.device == "cuda" else torch.device("cpu")

        def work(number: int) -> float:
            total = torch.full((1,), float(number), device=place)
            dist.all_reduce(total)
            return float(total)

        return work


def failing(rank: int) -> Callable[[Any], object]:
    """A rank that cannot begin."""
    raise ValueError(f"nothing for {rank}")


def main(device: str, what: str) -> None:
    """The first rank."""
    ranks, work = Ranks(2, device, Summing(device)), Summing(device)(0)
    with ranks.together():
        ranks.hand(1)
        print(ranks.processes[0].pid, flush=True)
        while what == "wait":
            time.sleep(1)
        while True:
            work(1)
            ranks.hand(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
