"""MMMU's validation set: multiple choice and open questions of 30 subjects in six disciplines.

The folder is either LLaVA's and TinyLLaVA's ``MMMU/`` (``anns_for_eval.json``, ``all_images/`` and the benchmark's
``eval/answer_dict_val.json``) or the published Parquet files (``validation-*.parquet``, in folders by subject or not).
Answers are read by the rules of the benchmark's ``eval_utils.py``. Where that draws an option at random, because an
answer names none or because TinyLLaVA's file has no picture for a question, ours is wrong unless a seed is given.
"""

import ast
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.benchmarks.files import once, picture, read_json, read_rows, take
from pipeline.benchmarks.mmbench import PROMPT as LETTER
from pipeline.benchmarks.open_answers import is_right
from pipeline.benchmarks.task import Item, Score, Task, by_group
from pipeline.benchmarks.vqa import SHORT
from schemas.errors import SampleInvalid, shown

PROMPTS, IMAGES = "anns_for_eval.json", "all_images"
ANSWERS = ("eval/answer_dict_val.json", "answer_dict_val.json")
PARQUET = "validation-*.parquet"
OUTPUT = "mmmu_val_output.json"
CHOICE = "multiple-choice"
# Of TinyLLaVA's script.
MAX_NEW_TOKENS = 1024
# With fewer words an answer is not searched for the text of an option.
LEAST_WORDS = 6
MARK = re.compile(r"<image (\d+)>")
SUBJECTS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": (
        "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health"
    ),
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": (
        "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power Materials "
        "Mechanical_Engineering"
    ),
}
DISCIPLINES = {subject: discipline for discipline, names in SUBJECTS.items() for subject in names.split()}


@dataclass(frozen=True)
class Key:
    """The right answers, and the options by letter, None for an open question; ``seen``: its pictures are there."""

    right: tuple[str, ...]
    options: Mapping[str, str] | None
    seen: bool = True


def read(folder: Path) -> list[Item]:
    """The questions, pictures in the order of their numbers; the group is the discipline.

    Raises:
        SampleInvalid: a file is missing or not as published, or a question has no answer there.
    """
    if (folder / PROMPTS).is_file():
        return _of_llava(folder)
    tables = sorted(folder.rglob(PARQUET))
    if not tables:
        raise SampleInvalid(f"{folder}: holds neither {PROMPTS} nor {PARQUET}; expected one form of the validation set")
    items = [_of_row(f"{path}: row {n}", row) for path in tables for n, row in enumerate(_table(path))]
    return once(items, folder)


def score(items: Sequence[Item], answers: Sequence[str], *, seed: int | None) -> dict[str, Score]:
    """``accuracy`` over all questions, and by discipline."""
    hits = []
    for item, answer in zip(items, answers, strict=True):
        key: Key = item.reference
        given = _letter(item, answer, seed)
        hits.append(float(is_right(answer, key.right) and key.seen if key.options is None else given in key.right))
    return by_group(hits, [item.group for item in items])


def files(items: Sequence[Item], answers: Sequence[str], *, seed: int | None) -> Mapping[str, bytes]:
    """What the benchmark's ``main_eval_only.py`` takes: letters, "" for none, and the texts of open answers."""
    rows = {}
    for item, answer in zip(items, answers, strict=True):
        key: Key = item.reference
        rows[item.id] = (answer if key.seen else "") if key.options is None else _letter(item, answer, seed) or ""
    return {OUTPUT: json.dumps(rows, indent=1).encode()}


def letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The option that an answer names, None if it names none (MMMU, ``parse_multi_choice_response``).

    That is the last of the letters in brackets; without such, of the letters between blanks; without such, in an answer
    of six words or more, of the options' texts.
    """
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    answer = f" {answer} "
    long = len(answer.split()) >= LEAST_WORDS
    ways = [
        {option: answer.rfind(f"({option})") for option in options},
        {option: answer.rfind(f" {option} ") for option in options},
        {option: answer.lower().rfind(text.lower()) if long else -1 for option, text in options.items()},
    ]
    for places in ways:
        if max(places.values()) >= 0:
            return max(places, key=places.__getitem__)
    return None


def task(seed: int | None) -> Task:
    """The task; with a ``seed`` an option is drawn where the official script draws one, a function of seed and id."""
    return Task("mmmu", MAX_NEW_TOKENS, read, partial(score, seed=seed), partial(files, seed=seed))


def _letter(item: Item, answer: str, seed: int | None) -> str | None:
    key: Key = item.reference
    if key.options is None:
        return None
    found = letter(answer, key.options) if key.seen else None
    if found is None and seed is not None:
        draw = np.random.default_rng([seed, zlib.crc32(item.id.encode())])
        return list(key.options)[int(draw.integers(len(key.options)))]
    return found


def _of_llava(folder: Path) -> list[Item]:
    path = next((folder / name for name in ANSWERS if (folder / name).is_file()), folder / ANSWERS[0])
    right = read_json(path)
    items = []
    for where, row in read_rows(folder / PROMPTS):
        name, kind = take(row, where, "id", str), take(row, where, "question_type", str)
        if not isinstance(right, dict) or not isinstance(right.get(name), dict):
            raise SampleInvalid(f"{where}: question {name}: has no answer in {path}")
        options = take(row, where, "index2ans", dict) if kind == CHOICE else None
        key = Key(_right(right[name], f"{path}: {name}", "ground_truth"), _checked(options, where), "image" in row)
        names = row.get("image", [])
        images = [picture(folder / IMAGES, n, where) for n in ([names] if isinstance(names, str) else names)]
        prompt = take(row, where, "prompt", str).replace("<image>\n", "").replace("<image>", "")
        items.append(Item(name, prompt, tuple(images), key, _discipline(name, where)))
    return once(items, folder / PROMPTS)


def _table(path: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # Arrow's errors are ValueErrors
        raise SampleInvalid(f"{path}: cannot be read as Parquet: {error}") from None
    return rows


def _of_row(where: str, row: dict[str, Any]) -> Item:
    """A published row as LLaVA's configuration words it."""
    name, question = take(row, where, "id", str), take(row, where, "question", str)
    options = None
    if take(row, where, "question_type", str) == CHOICE:
        texts = _list(take(row, where, "options", str), where, "options")
        options = _checked({chr(ord("A") + place): text for place, text in enumerate(texts)}, where)
    lines = [question, *(f"({option}) {text}" for option, text in (options or {}).items())]
    prompt = "\n".join(lines) + (f"\n\n{LETTER}" if options else f"\n{SHORT}")
    numbers = sorted({int(number) for number in MARK.findall("\n".join(lines))}) or [1]
    images = tuple(_image(row, where, f"image_{number}") for number in numbers)
    return Item(name, prompt, images, Key(_right(row, where, "answer"), options), _discipline(name, where))


def _image(row: dict[str, Any], where: str, name: str) -> bytes:
    data = take(row, where, name, dict).get("bytes")
    if not isinstance(data, bytes) or not data:
        raise SampleInvalid(f"{where}: `{name}`: holds no picture, though the question shows it")
    return data


def _right(row: dict[str, Any], where: str, name: str) -> tuple[str, ...]:
    """The right answers: a text, a list of texts, or such a list as Python writes it."""
    value = row.get(name)
    if isinstance(value, str) and value.startswith("["):
        value = _list(value, where, name)
    found = value if isinstance(value, list) else [value]
    if not found or not all(isinstance(text, str) and text for text in found):
        raise SampleInvalid(f"{where}: `{name}`: expected a text or a list of texts, got {shown(value)}")
    return tuple(found)


def _list(text: str, where: str, name: str) -> list[Any]:
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        found = None
    if not isinstance(found, list):
        raise SampleInvalid(f"{where}: `{name}`: expected a list in Python's spelling, got {shown(text)}")
    return found


def _checked(options: Mapping[str, Any] | None, where: str) -> dict[str, str] | None:
    if options is None:
        return None
    if not options:
        raise SampleInvalid(f"{where}: a question of multiple choice has no options")
    return {str(option): str(text) for option, text in options.items()}


def _discipline(name: str, where: str) -> str:
    subject = "_".join(name.split("_")[1:-1])
    if subject not in DISCIPLINES:
        raise SampleInvalid(f"{where}: `id`: expected <split>_<subject>_<number>, got {shown(name)}")
    return DISCIPLINES[subject]


TASK = task(None)
