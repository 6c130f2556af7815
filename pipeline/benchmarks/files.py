"""Reading benchmarks' files and files of answers: every fault is told with file, record and field."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pipeline.benchmarks.task import Item
from schemas.errors import SampleInvalid

T = TypeVar("T")
# How many of the ids in question a message names.
NAMED = 5


def read_text(path: Path) -> str:
    """A text file's content.

    Raises:
        SampleInvalid: the file is missing or not UTF-8.
    """
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise SampleInvalid(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise SampleInvalid(f"{path}: is not UTF-8 text") from None


def read_json(path: Path) -> Any:
    """The JSON value in a file.

    Raises:
        SampleInvalid: the file is missing or no JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise SampleInvalid(f"{path}: is not JSON: {error}") from None


def read_rows(path: Path, form: str | None = None) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSON list (``.json``), of JSON Lines (``.jsonl``) or of a table (``.tsv``), and where each is.

    ``form`` is that of a file whose name ends otherwise than what it holds.

    Raises:
        SampleInvalid: the file is missing or empty, or a record is no object.
    """
    # lines end at "\n" alone: splitlines() would also cut at U+2028 and its kin, which stand in questions
    if (form or path.suffix) == ".tsv":
        csv.field_size_limit(1 << 30)  # pictures stand in fields
        found: list[Any] = list(csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t"))
    elif (form or path.suffix) == ".jsonl":
        found = [_line(path, number, line) for number, line in enumerate(read_text(path).split("\n")) if line.strip()]
    else:
        found = read_json(path)
    if not isinstance(found, list) or not found:
        raise SampleInvalid(f"{path}: holds no records")
    for number, row in enumerate(found):
        if not isinstance(row, dict):
            raise SampleInvalid(f"{path}: record {number}: is no object")
    return [(f"{path}: record {number}", row) for number, row in enumerate(found)]


def take(row: dict[str, Any], where: str, name: str, kind: type[T]) -> T:
    """A record's field; numbers are taken where text is asked for, as ids are published as either.

    Raises:
        SampleInvalid: it is missing or of another type.
    """
    if name not in row or row[name] is None:
        raise SampleInvalid(f"{where}: has no field `{name}`")
    value = row[name]
    if kind is str and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, kind):
        raise SampleInvalid(f"{where}: `{name}`: expected {kind.__name__}, got {type(value).__name__}")
    return value


def picture(folder: Path, name: str, where: str) -> Path:
    """A picture's file inside a folder.

    Raises:
        SampleInvalid: there is none of that name, or it lies elsewhere.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise SampleInvalid(f"{where}: image {name}: lies outside {folder}")
    if not path.is_file():
        raise SampleInvalid(f"{where}: image {path}: does not exist")
    return path


def names(ids: Iterable[str]) -> str:
    """The first few of the ids, as a message names them."""
    named = list(ids)
    return ", ".join(named[:NAMED]) + (", …" if len(named) > NAMED else "")


def once(items: Sequence[Item], where: object) -> list[Item]:
    """The items, whose ids all differ.

    Raises:
        SampleInvalid: some do not.
    """
    if twice := [i for i, count in Counter(item.id for item in items).items() if count > 1]:
        raise SampleInvalid(f"{where}: {names(twice)}: more than one question has this id")
    return list(items)


def read_answers(path: Path, items: Sequence[Item]) -> list[str]:
    """Answers in the items' order from JSON Lines of ``id`` (or ``question_id``) and ``text`` (or ``answer``).

    An empty answer is an answer, which scores as such.

    Raises:
        SampleInvalid: an id is doubled, missing or unknown, or a record lacks a field.
    """
    found: list[tuple[str, str]] = []
    for where, row in read_rows(path):
        key = "question_id" if "question_id" in row and "id" not in row else "id"
        text = "answer" if "answer" in row and "text" not in row else "text"
        found.append((take(row, where, key, str), take(row, where, text, str)))
    wanted, given = {item.id for item in items}, Counter(i for i, _ in found)
    faults = {
        "more than one answer": [i for i, count in given.items() if count > 1],
        "no answer": [item.id for item in items if item.id not in given],
        "no such question": [i for i in given if i not in wanted],
    }
    for fault, ids in faults.items():
        if ids:
            raise SampleInvalid(f"{path}: {names(ids)}: {fault} ({len(ids)} of {len(items)} questions)")
    texts = dict(found)
    return [texts[item.id] for item in items]


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise SampleInvalid(f"{path}: line {number + 1}: is not JSON: {error}") from None
