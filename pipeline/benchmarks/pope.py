"""POPE: whether a model names objects that an image does not hold (Li et al. 2023, arXiv 2305.10355).

Owns the reading of LLaVA's question file beside POPE's own labels, the official reading of answers, and the figures.
The folder is ``pope/`` of LLaVA's eval.zip::

    llava_pope_test.jsonl              question_id, image, text (with its suffix), category (the split)
    coco/coco_pope_adversarial.json    JSON Lines of question_id, image, text, label ("yes" or "no")
    coco/coco_pope_popular.json
    coco/coco_pope_random.json
    val2014/                           COCO's images
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.benchmarks.files import names, once, picture, read_rows, take
from pipeline.benchmarks.task import Item, Score, Task
from schemas.errors import SampleInvalid, shown

SPLITS = ("adversarial", "popular", "random")
# LLaVA numbers the questions of the random split from 10 000 001 and of the popular one from 20 000 001 on, where
# POPE numbers each split from 1 on.
STRIDE = 10_000_000
SUFFIX = "Answer the question using a single word or phrase."
# The version of POPE's labels that LLaVA's questions were made from; later ones hold other questions.
LABELS = "github.com/AoiDragon/POPE at commit e3e39262"
# An answer's outcome: the column of (said yes, is yes) within its split's four.
OUTCOMES = {(True, True): 0, (True, False): 1, (False, False): 2, (False, True): 3}


@dataclass(frozen=True)
class Label:
    """What POPE says of one question."""

    image: str
    text: str
    present: bool


def read(folder: Path) -> list[Item]:
    """The questions of the three splits; ``reference`` is whether the object is there.

    Labels are found by id, and image and wording must be the question's. (The official script pairs answers and
    labels by their order.)

    Raises:
        SampleInvalid: a file, picture, label or question is missing, doubled or unlike what it belongs to.
    """
    sources = {split: folder / "coco" / f"coco_pope_{split}.json" for split in SPLITS}
    labels = {split: _labels(path) for split, path in sources.items()}
    path = folder / "llava_pope_test.jsonl"
    items = once([_item(folder, where, row, labels) for where, row in read_rows(path)], path)
    for split, wanted in labels.items():
        asked = {int(item.id) % STRIDE for item in items if item.group == split}
        if missing := [str(number) for number in wanted if number not in asked]:
            raise SampleInvalid(f"{path}: {split}: no questions for the labels {names(missing)} of {sources[split]}")
    return items


def says_yes(answer: str) -> bool:
    """The official reading: no where a word of the first sentence is ``No``, ``not`` or ``no``, else yes.

    So an answer with both words, such as "Yes, no doubt", counts as no, while "NO", "nothing" and an empty answer
    count as yes. A sentence ends at the first full stop, words at blanks, and commas are dropped.
    (POPE's ``evaluate.py``; lmms-eval compares the whole answer with the label instead.)
    """
    words = answer.strip().split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def score(items: Sequence[Item], answers: Sequence[str]) -> dict[str, Score]:
    """``f1``, the mean over the splits, as published; then each split's figures, ``random_f1`` and so on.

    A unit is an image with its questions of all splits, since those share what the model sees. Precision, recall and
    F1, for which yes is the positive answer, are 0 where they are undefined.
    """
    counts_UC = _counts(items, answers)
    splits = [split for split in SPLITS if _columns(counts_UC, split).any()]
    scores = {"f1": Score(counts_UC, _mean_f1(splits))}
    for split in splits:
        of_split = _columns(counts_UC, split)
        for name, figure in FIGURES.items():
            scores[f"{split}_{name}"] = Score(
                of_split[of_split.any(axis=1)], _of_sums(figure), gain=name != "yes_ratio"
            )
    return scores


def _labels(path: Path) -> dict[int, Label]:
    found: dict[int, Label] = {}
    for where, row in read_rows(path, ".jsonl"):
        number, label = take(row, where, "question_id", int), take(row, where, "label", str)
        if label not in ("yes", "no"):
            raise SampleInvalid(f"{where}: `label`: expected yes or no, got {shown(label)}")
        if number in found:
            raise SampleInvalid(f"{where}: `question_id`: {number} has a label already")
        found[number] = Label(take(row, where, "image", str), _bare(take(row, where, "text", str)), label == "yes")
    return found


def _item(folder: Path, where: str, row: dict[str, Any], labels: dict[str, dict[int, Label]]) -> Item:
    split, number = take(row, where, "category", str), take(row, where, "question_id", int)
    if split not in labels:
        raise SampleInvalid(f"{where}: `category`: expected one of {', '.join(SPLITS)}, got {shown(split)}")
    text, image = take(row, where, "text", str), take(row, where, "image", str)
    label = labels[split].get(number % STRIDE)
    if label is None:
        raise SampleInvalid(f"{where}: question {number}: the {split} split has no label {number % STRIDE}")
    if (label.image, label.text) != (image, _bare(text)):
        raise SampleInvalid(
            f"{where}: question {number}: the {split} label {number % STRIDE} is of {shown(label.image)}, "
            f"{shown(label.text)}: take the labels from {LABELS}"
        )
    return Item(str(number), text, (picture(folder / "val2014", image, where),), label.present, split)


def _bare(text: str) -> str:
    """A question without suffix, nor POPE's slip in those with "an", which some copies of the labels have mended."""
    return text.removesuffix(SUFFIX).strip().replace("imange", "image")


def _counts(items: Sequence[Item], answers: Sequence[str]) -> np.ndarray:
    """float64[images, splits x outcomes]: how many of an image's answers came out how."""
    images: dict[Any, np.ndarray] = {}
    for item, answer in zip(items, answers, strict=True):
        assert item.group is not None, "read() names the split"
        counts = images.setdefault(item.images, np.zeros(len(SPLITS) * len(OUTCOMES)))
        _columns(counts, item.group)[OUTCOMES[says_yes(answer), item.reference]] += 1
    return np.stack(list(images.values()))


def _columns(counts: np.ndarray, split: str) -> np.ndarray:
    """A split's outcomes, the last axis of counts or of their sums; a view."""
    at = len(OUTCOMES) * SPLITS.index(split)
    return counts[..., at : at + len(OUTCOMES)]


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def _accuracy(outcomes: np.ndarray) -> float:
    return _share(outcomes[0] + outcomes[2], outcomes.sum())


def _precision(outcomes: np.ndarray) -> float:
    return _share(outcomes[0], outcomes[0] + outcomes[1])


def _recall(outcomes: np.ndarray) -> float:
    return _share(outcomes[0], outcomes[0] + outcomes[3])


def _f1(outcomes: np.ndarray) -> float:
    return _share(2 * outcomes[0], 2 * outcomes[0] + outcomes[1] + outcomes[3])


def _yes_ratio(outcomes: np.ndarray) -> float:
    return _share(outcomes[0] + outcomes[1], outcomes.sum())


def _of_sums(figure: Callable[[np.ndarray], float]) -> Callable[[np.ndarray], float]:
    return lambda units_UC: figure(units_UC.sum(axis=0))


def _mean_f1(splits: Sequence[str]) -> Callable[[np.ndarray], float]:
    def statistic(units_UC: np.ndarray) -> float:
        sums = units_UC.sum(axis=0)
        return float(np.mean([_f1(_columns(sums, split)) for split in splits]))

    return statistic


FIGURES: dict[str, Callable[[np.ndarray], float]] = {
    "accuracy": _accuracy,
    "precision": _precision,
    "recall": _recall,
    "f1": _f1,
    "yes_ratio": _yes_ratio,
}

# LLaVA's and TinyLLaVA's loaders generate at most 128 tokens for the benchmarks of short answers.
TASK = Task("pope", 128, read, score)
