"""ScienceQA: school questions with up to five choices, half of them on an image (Lu et al. 2022, arXiv 2209.09513).

Owns the reading of LLaVA's question file beside ScienceQA's own problems, the reading of a letter from an answer, and
the accuracy on questions with an image that papers report as SQA-I. The folder is ``scienceqa/`` of LLaVA's eval.zip
with ScienceQA's files::

    llava_test_CQM-A.json     id, conversations (the question with its choices, the letter), image where there is one
    pid_splits.json           ids by split, of which ``test`` is asked
    problems.json             by id: choices, answer (the right choice's index)
    images/test/
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.benchmarks.files import names, once, picture, read_json, read_rows, take
from pipeline.benchmarks.task import Item, Score, Task, accuracy
from schemas.errors import SampleInvalid

LETTERS = "ABCDE"
# LLaVA and TinyLLaVA ask with it (--single-pred-prompt), so the published score of the teacher is with it; MaTVLM's
# script leaves it out.
SUFFIX = "Answer with the option's letter from the given choices directly."


def read(folder: Path) -> list[Item]:
    """The test split's questions; ``reference`` is the right letter, ``group`` is ``image`` or ``text``.

    Raises:
        SampleInvalid: a file, picture, split, problem or question is missing, doubled or not as published.
    """
    source, path = folder / "pid_splits.json", folder / "llava_test_CQM-A.json"
    wanted = {str(number) for number in take(_object(source), str(source), "test", list)}
    problems = _object(folder / "problems.json")
    items = once([_item(folder, where, row, problems) for where, row in read_rows(path)], path)
    asked = {item.id for item in items}
    if unknown := sorted(asked - wanted):
        raise SampleInvalid(f"{path}: {names(unknown)}: not in the test split of {source}")
    if missing := sorted(wanted - asked):
        raise SampleInvalid(f"{path}: {names(missing)}: in the test split of {source}, but not asked")
    return items


def letter(answer: str) -> str | None:
    """The letter that an answer gives, None where it gives none.

    Read are a letter alone, "B." and "B. because …", and otherwise one "The answer is B" anywhere (LLaVA's and
    TinyLLaVA's ``eval_science_qa.py``). They read neither "B." alone nor "The answer is B" at the very end, and take
    the first letter of "The answer is Boston"; here it is the other way round. "(B)", "Answer: B" and "b" are no
    letters there or here, and nothing is guessed. (ScienceQA's own script guesses at random; MaTVLM's also reads
    "The correct answer is" and "The option is".)
    """
    text = answer.strip()
    if found := re.match(rf"([{LETTERS}])(\.( |$)|$)", text):
        return found[1]
    stated = re.findall(r"The answer is ([A-Z])\b", text)
    return stated[0] if len(stated) == 1 else None


def score(items: Sequence[Item], answers: Sequence[str]) -> dict[str, Score]:
    """``image_accuracy`` over the questions with an image, which is reported, and ``accuracy`` over all."""
    hits = [letter(answer) == item.reference for item, answer in zip(items, answers, strict=True)]
    seen = [hit for item, hit in zip(items, hits, strict=True) if item.group == "image"]
    scores = {"image_accuracy": accuracy(seen)} if seen else {}
    return scores | {"accuracy": accuracy(hits)}


def _object(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict):
        raise SampleInvalid(f"{path}: expected an object, got {type(found).__name__}")
    return found


def _item(folder: Path, where: str, row: dict[str, Any], problems: dict[str, Any]) -> Item:
    number = take(row, where, "id", str)
    turns = take(row, where, "conversations", list)
    if not turns or not isinstance(turns[0], dict):
        raise SampleInvalid(f"{where}: `conversations`: expected turns of `from` and `value`")
    asked = take(turns[0], f"{where}: conversations[0]", "value", str).replace("<image>", "").strip()
    images: tuple[Path, ...] = ()
    if "image" in row:
        images = (picture(folder / "images" / "test", take(row, where, "image", str), where),)
    right = _right(number, folder / "problems.json", problems)
    return Item(number, f"{asked}\n{SUFFIX}", images, right, "image" if images else "text")


def _right(number: str, path: Path, problems: dict[str, Any]) -> str:
    where = f"{path}: problem {number}"
    problem = take(problems, str(path), number, dict)
    at, choices = take(problem, where, "answer", int), take(problem, where, "choices", list)
    if not 0 <= at < len(choices) <= len(LETTERS):
        raise SampleInvalid(f"{where}: `answer`: expected the index of one of {len(choices)} choices, got {at}")
    return LETTERS[at]


# LLaVA and TinyLLaVA allow 1024 tokens; under this prompt an answer is a letter, and what stands beyond 128 tokens
# could change a score only by the words "The answer is".
TASK = Task("scienceqa", 128, read, score)
