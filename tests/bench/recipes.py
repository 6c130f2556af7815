"""Compares recipes on one cache: ``python -m tests.bench.recipes RUN.yaml [--set a.b=c …]`` after ``decant demo``.

Each variant trains and evaluates under an artifact of its own: the teacher runs no more, and a rerun goes on with
what is missing. Prints a table for BENCHMARKS.md: exact match, its share of the teacher's, held-out KL, seconds.
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from jobs.stages import open_store, run_named
from pipeline.stage import require
from schemas.runfile import load_run
from tests.bench.result import Result, add_json, command

NO_ALIGN = "distill.phases=[{kind: distill, steps: 100, batch: 48, lr: 5.0e-4, warmup_steps: 5, decay_steps: 60%s}]"
VARIANTS = {
    "mimic": [],
    "matvlm": ["student.init=matvlm"],
    "random": ["student.init=random"],
    "kl-only": [NO_ALIGN % ", weights: {kl: 1, layer: 0}"],
    "kl-layer": [NO_ALIGN % ""],
    "ce-only": [NO_ALIGN % ", weights: {kl: 0, layer: 0, ce: 1}"],
}


def main(given: Sequence[str] | None = None) -> None:
    """Runs all variants and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    add_json(parser)
    arguments = parser.parse_args(given)
    sides: dict[str, dict[str, float]] = {}
    print("| variant | overall | share of the teacher | held-out KL | distill s |\n|---|---|---|---|---|", flush=True)
    for name in arguments.only:
        own = [f"{stage}.artifact=bench-{name}@1" for stage in ("distill", "evaluate")]
        run = load_run(arguments.run_file, [*arguments.overrides, *VARIANTS[name], *own])
        for stage in ("distill", "evaluate"):
            run_named(stage, run, Console(file=io.StringIO()))
        store = open_store(run)
        result = require(store, run.ref("evaluate")).result
        seconds = require(store, run.ref("distill")).provenance["seconds"]
        value = result["student"]["exact_match"]["overall"]["value"]
        kl = result["student"]["held_out_kl"]
        sides[name] = {"exact match": value, "recovery": result["recovery"], "held-out KL": kl, "seconds": seconds}
        print(
            f"| {name} | {100 * value:.1f} % | {100 * result['recovery']:.1f} % | {kl:.3f} | {seconds:.0f} |",
            flush=True,
        )
    ratios = {f"{name} / the teacher": figures["recovery"] for name, figures in sides.items()}
    Result("recipes", command("recipes", given), sides, ratios).write(arguments.json)


if __name__ == "__main__":
    main()
