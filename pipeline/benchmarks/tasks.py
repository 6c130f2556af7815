"""Every benchmark by the name that run files use."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

from pipeline.benchmarks import gqa, mmbench, mme, mmmu, mmvet, pope, scienceqa, textvqa, vqav2
from pipeline.benchmarks.task import Item, Task
from schemas.benchmarks import BenchmarkConfig, BenchmarkName
from schemas.canonical import digest
from schemas.errors import SampleInvalid

# There are a hundred thousand of them, and the published names do not change what they show.
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")

TASKS: Mapping[BenchmarkName, Task] = {
    "mme": mme.TASK,
    "mmbench": mmbench.TASK,
    "mmbench_circular": mmbench.CIRCULAR,
    "textvqa": textvqa.TASK,
    "gqa": gqa.TASK,
    "mmvet": mmvet.TASK,
    "scienceqa": scienceqa.TASK,
    "pope": pope.TASK,
    "mmmu": mmmu.TASK,
    "vqav2": vqav2.TASK,
}


def task_of(config: BenchmarkConfig) -> Task:
    """The benchmark that a run file names."""
    if config.task == "mmmu" and config.seed is not None:
        return mmmu.task(config.seed)
    return TASKS[config.task]


def read_items(config: BenchmarkConfig) -> list[Item]:
    """Its questions in the published order, or the drawn ones of them.

    Files stand by subtask or split, so a ``limit`` draws pictures at random and takes all questions of a picture, as
    some figures need, until there are so many questions; those without pictures are drawn one by one.

    Raises:
        SampleInvalid: the files are not as published.
    """
    items = task_of(config).read(Path(config.path))
    if config.limit is None or config.limit >= len(items):
        return items
    groups: dict[object, list[int]] = {}
    for number, item in enumerate(items):
        groups.setdefault(item.images or item.id, []).append(number)
    drawn, chosen = list(groups.values()), list[int]()
    Random(0).shuffle(drawn)
    for numbers in drawn:
        if len(chosen) >= config.limit:
            break
        chosen += numbers
    return [items[number] for number in sorted(chosen)]


def identity(config: BenchmarkConfig) -> dict[str, Any]:
    """What decides the answers and the scores: the settings, and the files' contents but for the pictures'.

    Raises:
        SampleInvalid: the folder does not exist.
    """
    folder = Path(config.path)
    if not folder.is_dir():
        raise SampleInvalid(f"evaluate.benchmarks: {config.task}: {folder}: is no folder")
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix.lower() not in PICTURES)
    found = [(str(p.relative_to(folder)), file_digest(p)) for p in files]
    return {**config.model_dump(mode="json", exclude={"path"}), "data": digest(found)}


def file_digest(path: Path) -> str:
    """A file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
