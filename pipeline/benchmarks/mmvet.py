"""MM-Vet: open questions that a language model grades (Yu et al. 2023, arXiv 2308.02490).

Owns the reading of LLaVA's question file and the predictions for MM-Vet's own grader, which asks GPT-4; there is no
score without it. The folder is ``mm-vet/`` of LLaVA's eval.zip with the images of MM-Vet's archive::

    llava-mm-vet.jsonl      question_id, image, text (no suffix)
    images/
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.benchmarks.files import once, picture, read_rows, take
from pipeline.benchmarks.task import Item, Score, Task


def read(folder: Path) -> list[Item]:
    """The questions, without references.

    Raises:
        SampleInvalid: a file or picture is missing, or a record is not as published or doubled.
    """
    path = folder / "llava-mm-vet.jsonl"
    return once([_item(folder, where, row) for where, row in read_rows(path)], path)


def score(_items: Sequence[Item], _answers: Sequence[str]) -> dict[str, Score]:
    """Nothing: the grader scores."""
    return {}


def files(items: Sequence[Item], answers: Sequence[str]) -> Mapping[str, bytes]:
    """``mm-vet.json``: the predictions by ``v1_`` and question id (LLaVA's ``convert_mmvet_for_eval.py``).

    To be laid into the grader's ``--result_path`` under the name that its ``--model`` gets. The grader wants all 218
    predictions.
    """
    found = {f"v1_{item.id}": answer for item, answer in zip(items, answers, strict=True)}
    return {"mm-vet.json": json.dumps(found, indent=2).encode()}


def _item(folder: Path, where: str, row: dict[str, Any]) -> Item:
    image = picture(folder / "images", take(row, where, "image", str), where)
    return Item(take(row, where, "question_id", str), take(row, where, "text", str), (image,))


# As LLaVA's and TinyLLaVA's model_vqa.py, whose answers may be essays.
TASK = Task("mmvet", 1024, read, score, files)
