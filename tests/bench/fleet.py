"""The ``cache`` stage on several GPUs: ``python -m tests.bench.fleet [--gpus 1 2 4]``.

Weak scaling of ``tests.bench.capture``'s stage through Ray Data: a teacher worker a GPU, the same number of shards for
each, all of them alike, decoders in proportion. Efficiency is tokens a second of all workers over what as many times
the fewest would do: from the end of the warm shards' computing to the last commit of all, and ``steady``, without what
the last worker runs alone at the end, which a run of thousands of shards does not notice. ``--small`` runs on the CPU,
to see that it runs.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial

from cluster.session import session
from tests.bench.capture import VARIANTS, Bench, Figures, add_sizes, in_turns
from tests.bench.result import Result, add_json, command, print_table

ROUNDS = 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_sizes(parser)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    add_json(parser)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(folder, given, max(given.gpus))
        works: dict[str, Callable[[], Figures]] = {
            _side(name, workers): partial(bench.staged, VARIANTS[name], workers)
            for name in given.variants
            for workers in given.gpus
        }
        with session():
            sides = in_turns(works, given.rounds)
    found: Figures = {}
    for name in given.variants:
        found |= efficiencies(name, given.gpus, sides)
    print_table(sides)
    print_table({name: {"of the fewest": value} for name, value in found.items()})
    Result("fleet", command("fleet", arguments), sides, found).write(given.json)


def efficiencies(name: str, gpus: Sequence[int], sides: dict[str, Figures]) -> Figures:
    """By the number of workers, of one variant."""
    fewest = sides[_side(name, gpus[0])]
    return {
        f"{_side(name, workers)}, {rate}: efficiency": sides[_side(name, workers)][rate]
        / (fewest[rate] * workers / gpus[0])
        for workers in gpus
        for rate in ("tokens/s", "steady tokens/s")
    }


def _side(name: str, workers: int) -> str:
    return f"stage: {name}, {workers} GPU"


if __name__ == "__main__":
    main()
