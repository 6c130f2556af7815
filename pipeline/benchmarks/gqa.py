"""GQA: questions about what stands where in an image, by exact match (Hudson and Manning 2019, arXiv 1902.09506).

Owns the reading of the balanced test-dev questions, LLaVA's clean-up of answers, and the predictions that GQA's
``eval.py`` takes. The folder is ``gqa/`` of LLaVA's eval.zip::

    llava_gqa_testdev_balanced.jsonl          question_id, image, text (with its suffix)
    data/testdev_balanced_questions.json      by question id: answer, types.structural, …; or in data/questions1.2/
    data/images/
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.benchmarks.files import names, once, picture, read_json, read_rows, take
from pipeline.benchmarks.task import Item, Score, Task
from schemas.errors import SampleInvalid

QUESTIONS = "testdev_balanced_questions.json"
PREDICTIONS = "testdev_balanced_predictions.json"


def read(folder: Path) -> list[Item]:
    """The questions; ``reference`` is the answer, ``group`` is ``open`` or ``binary`` as GQA names them.

    Raises:
        SampleInvalid: a file, picture, question or answer is missing or doubled.
    """
    source = _questions(folder / "data")
    answers = read_json(source)
    if not isinstance(answers, dict) or not answers:
        raise SampleInvalid(f"{source}: expected an object of questions by their ids, got {type(answers).__name__}")
    path = folder / "llava_gqa_testdev_balanced.jsonl"
    items = once([_item(folder, where, row, answers, source) for where, row in read_rows(path)], path)
    if missing := sorted(set(answers) - {item.id for item in items}):
        raise SampleInvalid(f"{path}: {names(missing)}: in {source}, but not asked ({len(missing)} questions)")
    return items


def cleaned(answer: str) -> str:
    """An answer as it is compared: full stops at its end off, lower case (LLaVA's ``convert_gqa_for_eval.py``).

    Articles, numbers in words and other punctuation stay: "the car" is not "car" and "2" is not "two".
    """
    return answer.strip().rstrip(".").lower()


def score(items: Sequence[Item], answers: Sequence[str]) -> dict[str, Score]:
    """``accuracy``, then that of the ``binary`` questions and of the ``open`` ones (GQA's ``eval.py``).

    A unit is an image with its questions, some thirty in the published set: they share what the model sees and often
    follow from each other, so that questions resampled one by one would give too narrow an interval.
    """
    hits = [cleaned(answer) == item.reference for item, answer in zip(items, answers, strict=True)]
    scores = {}
    for name, groups in (("accuracy", ("binary", "open")), ("binary", ("binary",)), ("open", ("open",))):
        images: dict[Any, np.ndarray] = {}
        for item, hit in zip(items, hits, strict=True):
            if item.group in groups:
                images.setdefault(item.images, np.zeros(2))[:] += (hit, 1)
        if images:
            scores[name] = Score(np.stack(list(images.values())), _share)
    return scores


def files(items: Sequence[Item], answers: Sequence[str]) -> Mapping[str, bytes]:
    """``testdev_balanced_predictions.json``: a list of questionId and prediction."""
    found = [{"questionId": i.id, "prediction": cleaned(a)} for i, a in zip(items, answers, strict=True)]
    return {PREDICTIONS: json.dumps(found).encode()}


def _questions(data: Path) -> Path:
    """GQA's archive unpacks into a folder of its version, which LLaVA's layout does without."""
    archived = data / "questions1.2" / QUESTIONS
    return archived if archived.is_file() else data / QUESTIONS


def _item(folder: Path, where: str, row: dict[str, Any], answers: dict[str, Any], source: Path) -> Item:
    number = take(row, where, "question_id", str)
    image = picture(folder / "data" / "images", take(row, where, "image", str), where)
    question = take(answers, f"{where}: {source}", number, dict)
    at = f"{source}: question {number}"
    structural = take(take(question, at, "types", dict), at, "structural", str)
    group = "open" if structural == "query" else "binary"
    return Item(number, take(row, where, "text", str), (image,), take(question, at, "answer", str), group)


def _share(units_UC: np.ndarray) -> float:
    """The sum of the first column over that of the second."""
    right, asked = units_UC.sum(axis=0)
    return float(right / asked)


# LLaVA's and TinyLLaVA's loaders generate at most 128 tokens for the benchmarks of short answers.
TASK = Task("gqa", 128, read, score, files)
