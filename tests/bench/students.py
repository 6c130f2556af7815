"""Six students from one cache, after ``decant cache RUN.yaml``: ``python -m tests.bench.students RUN.yaml``.

Three ratios and three mixes of losses. The teacher runs no more: each student trains from the cache alone and is
watched on samples of the cache that are held out. Exact match is by ``evaluate``, where teacher and student answer the
test questions. A rerun goes on with what is missing. Prints a table for BENCHMARKS.md.
"""

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from jobs.stages import open_store, run_named
from pipeline.stage import require
from schemas.artifacts import LOG
from schemas.runfile import load_run
from tests.bench.result import Result, add_json, command

MIXES = {
    "KL + layer": "{kl: 1, layer: 1}",
    "KL": "{kl: 1, layer: 0}",
    "KL + layer + CE": "{kl: 1, layer: 1, ce: 1}",
}
STUDENTS = (
    (0.125, "KL + layer"),
    (0.25, "KL + layer"),
    (0.5, "KL + layer"),
    (0.25, "KL"),
    (0.25, "KL + layer + CE"),
    (0.5, "KL"),
)


def main(given: Sequence[str] | None = None) -> None:
    """Trains and evaluates all students and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--only", type=int, default=len(STUDENTS), help="how many of them, from the first")
    add_json(parser)
    arguments = parser.parse_args(given)
    sides: dict[str, dict[str, float]] = {}
    print("| replaced | losses | exact match | of the teacher | held-out KL | held-out top-1 | distill s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for ratio, mix in STUDENTS[: arguments.only]:
        name = f"student-{100 * ratio:g}-{mix.replace(' + ', '-').lower()}@1"
        own = [f"student.layers.ratio={ratio}", f"distill.phases.1.weights={MIXES[mix]}"]
        own += [f"{stage}.artifact={name}" for stage in ("distill", "evaluate")]
        run = load_run(arguments.run_file, [*arguments.overrides, *own])
        for stage in ("distill", "evaluate"):
            run_named(stage, run, Console(file=io.StringIO()))
        store = open_store(run)
        result = require(store, run.ref("evaluate")).result
        trained = require(store, run.ref("distill"))
        last = json.loads(store.read(f"{run.ref('distill')}/{LOG}").splitlines()[-1])
        sides[name] = {
            "exact match": result["student"]["exact_match"]["overall"]["value"],
            "recovery": result["recovery"],
            "held-out KL": last["held_out_kl"],
            "held-out top-1": last["held_out_top1"],
            "seconds": trained.provenance["seconds"],
        }
        cells = (
            f"{100 * ratio:g} % {trained.result['replaced']}",
            mix,
            f"{100 * result['student']['exact_match']['overall']['value']:.1f} %",
            f"{100 * result['recovery']:.1f} %",
            f"{last['held_out_kl']:.4f}",
            f"{100 * last['held_out_top1']:.2f} %",
            f"{trained.provenance['seconds']:.0f}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)
    ratios = {f"{name} / the teacher": figures["recovery"] for name, figures in sides.items()}
    Result("students", command("students", given), sides, ratios).write(arguments.json)


if __name__ == "__main__":
    main()
