"""The cached training step on several GPUs: ``python -m tests.bench.scaling [--gpus 1 2 4]``.

Weak scaling of ``tests.bench.training``'s step: every device has the same samples a step, so that all have the same
work. One process a device with the training loop's engine; tokens a second of all devices, medians of rounds,
and the share of what as many single devices would do. ``--small`` runs on the CPU, to see that it runs.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing

from pipeline.training.engine import Worker
from tests.bench.pair import Pair, add_sizes, sizes_of
from tests.bench.training import ROUNDS, STEPS, CachedStep, cached_batches, raw_batches, timed


def worker(rank: int, world: int, folder: str, given: argparse.Namespace) -> None:
    """One device's part; the first writes milliseconds a step and the peak of memory in gigabytes."""
    device = torch.device("cpu") if given.small else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world)
    pair = Pair(sizes_of(given), Worker(rank, world, device))
    batches = cached_batches(pair, raw_batches(pair, given.tapped, STEPS))
    step = CachedStep(pair)
    rounds = []
    for _ in range(given.rounds + 1):  # the first warms up
        dist.barrier()
        rounds.append(timed(pair, step, batches))
    if rank == 0:
        spent = statistics.median(r[0] for r in rounds[1:])
        peak = max(r[1] for r in rounds[1:]) - pair.spare
        Path(folder, str(world)).write_text(f"{spent} {peak / 1e9}")
    dist.destroy_process_group()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_sizes(parser)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tapped", type=float, default=0.05, help="share of the samples with taps")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    print("| devices | tokens/s | ms a step | efficiency | peak GB a device |\n|---|---|---|---|---|", flush=True)
    alone = None
    with tempfile.TemporaryDirectory() as folder:
        for world in given.gpus:
            multiprocessing.spawn(worker, (world, folder, given), nprocs=world)
            spent, peak = map(float, Path(folder, str(world)).read_text().split())
            alone = alone or spent
            rate = 1000 * world * sizes_of(given).a_step / spent
            print(f"| {world} | {rate:,.0f} | {spent:,.1f} | {alone / spent:.2f} | {peak:.1f} |", flush=True)


if __name__ == "__main__":
    main()
