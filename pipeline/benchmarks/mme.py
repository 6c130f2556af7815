"""MME: two yes/no questions an image, in fourteen subtasks (Fu et al. 2023, arXiv 2306.13394).

Owns the reading of LLaVA's question file beside MME's own answers, the sums, and the files for MME's own calculation.
The folder is ``MME/`` of LLaVA's eval.zip::

    llava_mme.jsonl                    question_id, image, text (with its suffix), category (the subtask)
    MME_Benchmark_release_version/     SUBTASK/IMAGE beside SUBTASK/IMAGE.txt, or SUBTASK/images/IMAGE beside
                                       SUBTASK/questions_answers_YN/IMAGE.txt: lines of question, tab, Yes or No
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.benchmarks.files import once, picture, read_rows, read_text, take
from pipeline.benchmarks.task import Item, Score, Task, accuracy
from schemas.errors import SampleInvalid, shown

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = PERCEPTION + COGNITION
IMAGES = "MME_Benchmark_release_version"
# What LLaVA asks with, and what MME asks with in its place.
SUFFIXES = ("Answer the question using a single word or phrase.", "Please answer yes or no.")
# A subtask's points: 100 for accuracy and 100 for accuracy⁺.
POINTS = 200.0


@dataclass(frozen=True)
class Truth:
    """What MME says of one question: ``question`` and ``answer`` as published, in ``file`` of the subtask."""

    image: str
    file: str
    question: str
    answer: str


def read(folder: Path) -> list[Item]:
    """Every image's two questions, one after the other; ``reference`` is a ``Truth``, ``group`` the subtask.

    Questions of one image share LLaVA's id, so ``#1`` and ``#2`` are added in the order of their wording.

    Raises:
        SampleInvalid: a file, picture, subtask or answer is missing, or an image has not two different questions.
    """
    path = folder / "llava_mme.jsonl"
    rows: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for where, row in read_rows(path):
        rows.setdefault(take(row, where, "question_id", str), []).append((where, row))
    items = once([item for image, of_image in rows.items() for item in _image(folder, image, of_image)], path)
    if missing := [subtask for subtask in SUBTASKS if subtask not in {item.group for item in items}]:
        raise SampleInvalid(f"{path}: has no questions of {', '.join(missing)}: the sums are over all subtasks")
    return items


def said(answer: str) -> str:
    """The official reading (``calculation.py``): the first of yes and no in the first four letters, else ``other``.

    "Not at all" and "I know" are therefore no and other, "Know" is no. (lmms-eval takes "y" and "n" as well.)
    """
    start = answer.strip().lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def score(items: Sequence[Item], answers: Sequence[str]) -> dict[str, Score]:
    """``perception`` (0 to 2000), ``cognition`` (0 to 800), then each subtask's points, accuracy and accuracy⁺.

    Accuracy⁺ is the share of images with both questions answered right. A subtask's points are 100 times the sum of
    the two, and perception and cognition are sums over their subtasks, as published. A unit is an image with both
    questions; one whose second question was not asked is left out. Where subtasks have no image, in a subset or among
    a bootstrap's draws, each counts as the mean of the others.
    """
    right: dict[str, list[int]] = {subtask: [] for subtask in SUBTASKS}
    for pair in _pairs(items, answers):
        subtask = pair[0][0].group
        assert subtask is not None, "read() names the subtask"
        right[subtask].append(sum(said(answer) == item.reference.answer.lower() for item, answer in pair))
    scores = {}
    for name, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        if units := [(at, _points(hits)) for at, subtask in enumerate(subtasks) for hits in right[subtask]]:
            scores[name] = Score(np.asarray(units, np.float64), _total(len(subtasks)), POINTS * len(subtasks))
    for subtask, hits in right.items():
        if hits:
            scores[subtask] = Score(np.asarray([[_points(n)] for n in hits]), _first_mean, POINTS)
            scores[f"{subtask}_accuracy"] = accuracy([n / 2 for n in hits])
            scores[f"{subtask}_accuracy_plus"] = accuracy([n == 2 for n in hits])
    return scores


def files(items: Sequence[Item], answers: Sequence[str]) -> Mapping[str, bytes]:
    """``SUBTASK.txt`` as ``calculation.py --results_dir`` takes them: file, question, answer, prediction by tabs.

    The two lines of an image follow each other. Tabs and line ends of a prediction become blanks, as they would
    end its field.
    """
    lines: dict[str, list[str]] = {}
    for pair in _pairs(items, answers):
        for item, answer in pair:
            truth = item.reference
            fields = (truth.file, truth.question, truth.answer, re.sub(r"\s", " ", answer.strip()))
            lines.setdefault(f"{item.group}.txt", []).append("\t".join(fields) + "\n")
    return {name: "".join(of_subtask).encode() for name, of_subtask in lines.items()}


def _image(folder: Path, image: str, rows: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[Item]:
    where = rows[0][0]
    texts = sorted(take(row, at, "text", str) for at, row in rows)
    if len(set(texts)) != 2 or len(texts) != 2:
        raise SampleInvalid(f"{where}: {image}: expected two different questions, got {shown(texts)}")
    subtask = take(rows[0][1], where, "category", str)
    if subtask not in SUBTASKS:
        raise SampleInvalid(f"{where}: `category`: expected one of {', '.join(SUBTASKS)}, got {shown(subtask)}")
    shot = picture(folder / IMAGES, take(rows[0][1], where, "image", str), where)
    truths = _truths(shot, image)
    for number, text in enumerate(texts, start=1):
        if _bare(text) not in truths:
            raise SampleInvalid(f"{where}: {shown(text)}: MME has no such question of {shot}")
        yield Item(f"{image}#{number}", text, (shot,), truths[_bare(text)], subtask)


def _truths(shot: Path, image: str) -> dict[str, Truth]:
    """MME's questions of an image by their bare wording."""
    folder = shot.parent.parent / "questions_answers_YN" if shot.parent.name == "images" else shot.parent
    path = folder / f"{shot.name.split('.')[0]}.txt"
    found = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        question, _, answer = line.strip().partition("\t")
        if answer.lower() not in ("yes", "no"):
            raise SampleInvalid(f"{path}: line {number}: expected a question, a tab and Yes or No, got {shown(line)}")
        found[_bare(question)] = Truth(image, path.name, question, answer)
    return found


def _bare(text: str) -> str:
    """A question without suffix; MME has one or two blanks before its own."""
    for suffix in SUFFIXES:
        text = text.replace(suffix, "")
    return text.strip()


def _pairs(items: Sequence[Item], answers: Sequence[str]) -> list[list[tuple[Item, str]]]:
    """The images of which both questions are there, with their answers."""
    images: dict[str, list[tuple[Item, str]]] = {}
    for item, answer in zip(items, answers, strict=True):
        images.setdefault(item.reference.image, []).append((item, answer))
    return [pair for pair in images.values() if len(pair) == 2]


def _points(right: int) -> float:
    """An image's points by how many of its questions were answered right."""
    return 50.0 * right + 100.0 * (right == 2)


def _first_mean(units_UC: np.ndarray) -> float:
    return float(units_UC[:, 0].mean())


def _total(subtasks: int) -> Callable[[np.ndarray], float]:
    """The sum over subtasks of the mean points of their images; a unit is (subtask, points)."""

    def statistic(units_UC: np.ndarray) -> float:
        of_subtask = units_UC[:, 0].astype(np.int64)
        images = np.bincount(of_subtask)
        points = np.bincount(of_subtask, weights=units_UC[:, 1])
        there = images > 0
        return float((points[there] / images[there]).mean() * subtasks)

    return statistic


# LLaVA's and TinyLLaVA's loaders generate at most 128 tokens for the benchmarks of short answers.
TASK = Task("mme", 128, read, score, files)
