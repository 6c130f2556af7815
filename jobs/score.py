"""``decant score``: what a benchmark says of a file of answers, whoever gave them."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.benchmarks.files import read_answers
from pipeline.benchmarks.tasks import TASKS, read_items, task_of
from schemas.benchmarks import BenchmarkConfig
from schemas.errors import ConfigInvalid


def benchmark(task: str, folder: Path, seed: int | None) -> BenchmarkConfig:
    """The benchmark of a name.

    Raises:
        ConfigInvalid: there is none of that name.
    """
    if task not in TASKS:
        raise ConfigInvalid(f"{task}: is no benchmark; there are {', '.join(TASKS)}")
    return BenchmarkConfig.model_validate({"task": task, "path": str(folder), "seed": seed})


def score(config: BenchmarkConfig, answers: Path, out: Console, *, as_json: bool, files: Path | None) -> None:
    """Prints the figures; writes into ``files`` what the benchmark's server or grader takes.

    Raises:
        SampleInvalid: the benchmark's files or the answers are not as expected.
    """
    task, items = task_of(config), read_items(config)
    said = read_answers(answers, items)
    found = {name: figure.estimate() for name, figure in task.score(items, said).items()}
    if files is not None:
        files.mkdir(parents=True, exist_ok=True)
        for name, data in task.files(items, said).items():
            (files / name).parent.mkdir(parents=True, exist_ok=True)
            (files / name).write_bytes(data)
    if as_json:
        out.print(json.dumps({"task": task.name, "questions": len(items), "figures": found}), markup=False)
        return
    if not found:
        out.print(f"{task.name}: these files hold no labels; its server or grader scores the answers (--files)")
    else:
        table = Table(task.name, "value", "95 % interval", "n")
        for name, figure in found.items():
            low, high = figure["ci95"]
            table.add_row(name, f"{figure['value']:.4g}", f"{low:.4g} to {high:.4g}", str(figure["n"]))
        out.print(table)
    if empty := sum(not text.strip() for text in said):
        out.print(f"{empty} of {len(items)} answers are empty")
