"""Writes benchmarks' files as they are published, and answers questions by their ids."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.benchmarks.task import Item, Task


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), "utf-8")
    return path


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def write_picture(path: Path) -> Path:
    """A file in a picture's place: reading a benchmark opens none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\xff\xd8\xff")
    return path


def shuffled(rows: Sequence[Any], seed: int) -> list[Any]:
    return random.Random(seed).sample(rows, len(rows))


def figures(task: Task, items: Sequence[Item], answers: Mapping[str, str]) -> dict[str, float]:
    """The task's figures where each question gets the answer with its id."""
    scores = task.score(items, [answers[item.id] for item in items])
    return {name: float(score.statistic(score.units_UC)) for name, score in scores.items()}
