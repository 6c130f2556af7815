"""The cached training step on several GPUs: ``python -m tests.bench.scaling [--gpus 1 2 4] [--strategies ddp zero2]``.

Weak scaling of ``tests.bench.training``'s step: every device has the same samples a step, so that all have the same
work. One process a device with the training loop's engines, beside each other in the same processes; tokens a second
of all devices, medians of rounds, and the share of what as many devices would do alone with the first strategy.
``--small`` runs on the CPU, to see that it runs.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing

from pipeline.training.engine import Worker
from tests.bench.pair import Pair, add_sizes, sizes_of
from tests.bench.result import Figures, Result, add_json, command, print_table
from tests.bench.training import ROUNDS, STEPS, CachedStep, cached_batches, raw_batches, timed


def worker(rank: int, world: int, folder: str, given: argparse.Namespace) -> None:
    """One device's part of all strategies; the first writes what it found."""
    device = torch.device("cpu") if given.small else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world)
    for strategy in given.strategies:
        figures = measured(strategy, Worker(rank, world, device), given)
        if rank == 0:
            Path(folder, f"{strategy}-{world}").write_text(json.dumps(figures))
    dist.destroy_process_group()


def measured(strategy: str, own: Worker, given: argparse.Namespace) -> dict[str, float]:
    """Medians of the rounds with one engine, which is gone afterwards: milliseconds a step and the peak of memory."""
    pair = Pair(sizes_of(given), own, strategy=strategy)
    if given.compile:
        pair.compile()
    batches = cached_batches(pair, raw_batches(pair, given.tapped, given.steps))
    step, rounds = CachedStep(pair), []
    for _ in range(given.rounds + 1):  # the first warms up
        dist.barrier()
        rounds.append(timed(pair, step, batches))
    pair.engine.close()
    return {
        "ms a step": statistics.median(r[0] for r in rounds[1:]),
        "peak GB a device": (max(r[1] for r in rounds[1:]) - pair.spare) / 1e9,
        "loss": rounds[-1][2],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_sizes(parser)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--strategies", nargs="+", choices=("ddp", "zero1", "zero2"), default=["ddp", "zero2"])
    parser.add_argument("--tapped", type=float, default=0.05, help="share of the samples with taps")
    parser.add_argument("--steps", type=int, default=STEPS, help="a round")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--compile", action="store_true", help="compile the stock layers")
    add_json(parser)
    given = parser.parse_args(arguments)
    sides: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in given.gpus:
            multiprocessing.spawn(worker, (world, folder, given), nprocs=world)
            for strategy in given.strategies:
                found = json.loads(Path(folder, f"{strategy}-{world}").read_text())
                rate = 1000 * world * sizes_of(given).a_step / found["ms a step"]
                sides[f"{strategy}, {world}"] = {"tokens/s": rate, **found}
    ratios = efficiencies(given.strategies, given.gpus, sides)
    print_table({name: {**figures, "efficiency": ratios[name]} for name, figures in sides.items()})
    Result("scaling", command("scaling", arguments), sides, ratios).write(given.json)


def efficiencies(strategies: Sequence[str], gpus: Sequence[int], sides: dict[str, Figures]) -> dict[str, float]:
    """Tokens a second over those of as many devices as the fewest are, with the first strategy."""
    rates = {name: float(figures["tokens/s"] or 0) for name, figures in sides.items()}
    alone = rates[f"{strategies[0]}, {gpus[0]}"] / gpus[0]
    return {f"{s}, {n}": rates[f"{s}, {n}"] / (n * alone) for n in gpus for s in strategies}


if __name__ == "__main__":
    main()
