"""MMBench's dev set: each question once (``TASK``), or in every rotation of its options (``CIRCULAR``).

The folder holds ``mmbench_dev_20230712.tsv``, or the file under the names that VLMEvalKit gives it. Pictures stand in
the table in base64. The published table holds the rotations as rows of their own, ``index`` + 1,000,000 for each; of a
table without them they are made here. Answers are read by VLMEvalKit's rules without a judge; an answer that these
cannot read is wrong.

The server takes an Excel file. ``FILE`` has its columns as tab-separated text, which a spreadsheet saves as ``.xlsx``.
"""

import base64
import binascii
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from pipeline.benchmarks.files import once, read_rows, take
from pipeline.benchmarks.task import Item, Score, Task, by_group
from schemas.errors import SampleInvalid, shown

TABLES = ("mmbench_dev_20230712.tsv", "MMBench_DEV_EN_legacy.tsv", "MMBench_DEV_EN.tsv")
FILE = "mmbench_submission.tsv"
# What LLaVA uploads, and the categories that the server's description asks for.
COLUMNS = ("index", "question", "A", "B", "C", "D", "prediction", "answer", "category", "l2-category", "split")
LETTERS = "ABCD"
PROMPT = "Answer with the option's letter from the given choices directly."
# Of LLaVA's and TinyLLaVA's script.
MAX_NEW_TOKENS = 1024
# The distance between the indices of a question's rotations.
OFFSET = 1_000_000
# A field this short is the index of the row that has the picture (VLMEvalKit's tables).
REFERENCE = 64
# What pandas reads as missing, and LLaVA beyond that in any case.
MISSING, MISSING_ANY_CASE = {"", "NA", "N/A", "n/a", "NULL", "null"}, {"nan", "none"}
# A letter counts as an answer among the last five words, elsewhere ``A`` is an article (VLMEvalKit).
LAST_WORDS = 5
SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


@dataclass(frozen=True)
class Choice:
    """What is compared with an answer: the options as asked by letter, and the right letter, None if not public.

    ``question`` is the index of the unrotated question, which is asked in ``rotations``; ``row`` is for the submission.
    """

    options: Mapping[str, str]
    right: str | None
    question: int
    rotations: int
    row: Mapping[str, str]


@dataclass(frozen=True)
class Row:
    """A row of the table, and where it stands."""

    where: str
    index: int
    fields: dict[str, Any]


def read(folder: Path, *, circular: bool) -> list[Item]:
    """The questions, or all their rotations, those of a question one after the other.

    Raises:
        SampleInvalid: the table is missing or not as published, or a picture is not base64.
    """
    path = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if path is None:
        raise SampleInvalid(f"{folder}: holds no table; expected one of {', '.join(TABLES)}")
    rows = _rows(path)
    pictures = _Pictures({row.index: row for row in rows})
    items: list[Item] = []
    for group in _questions(rows):
        asked = group if circular else group[:1]
        items += [_item(row, pictures.of(row), len(asked)) for row in asked]
    return once(items, path)


def score(items: Sequence[Item], answers: Sequence[str]) -> dict[str, Score]:
    """``accuracy`` over questions, and by category (``l2-category``); nothing without public answers.

    A question is right if every rotation that was to be asked is. One of which a limit cut rotations off is left out.
    """
    hits: dict[int, list[bool]] = {}
    chosen: dict[int, Item] = {}
    for item, answer in zip(items, answers, strict=True):
        choice: Choice = item.reference
        if choice.right is None:
            return {}
        chosen.setdefault(choice.question, item)
        hits.setdefault(choice.question, []).append(letter(answer, choice.options) == choice.right)
    whole = [q for q in hits if len(hits[q]) == chosen[q].reference.rotations]
    if not whole:
        return {}
    return by_group([float(all(hits[q])) for q in whole], [chosen[q].group for q in whole])


def files(items: Sequence[Item], answers: Sequence[str]) -> Mapping[str, bytes]:
    """The submission, one row a rotation."""
    sink = io.StringIO()
    writer = csv.DictWriter(sink, COLUMNS, delimiter="\t", lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for item, answer in zip(items, answers, strict=True):
        writer.writerow({**item.reference.row, "prediction": answer})
    return {FILE: sink.getvalue().encode()}


def letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The option that an answer names, None where that cannot be told (VLMEvalKit, ``can_infer``).

    That is the one option letter among its last words, or else the one option whose text it contains, if it is at most
    twice as long as all options.
    """
    words = answer.translate(SEPARATORS).split()
    named = [option for option in options if option in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - LAST_WORDS:
        return named[0]
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    said = [option for option, text in options.items() if text.lower() in answer.lower()]
    return said[0] if len(said) == 1 else None


def _rows(path: Path) -> list[Row]:
    rows = []
    seen: set[int] = set()
    for where, fields in read_rows(path):
        text = take(fields, where, "index", str)
        if not text.isdecimal():
            raise SampleInvalid(f"{where}: `index`: expected a number, got {shown(text)}")
        if int(text) in seen:
            raise SampleInvalid(f"{where}: index {text}: more than one row has it")
        seen.add(int(text))
        rows.append(Row(where, int(text), fields))
    return rows


def _questions(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each question, the unrotated one first; they are made where the table has that one alone."""
    groups: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.index):
        groups.setdefault(row.index % OFFSET, []).append(row)
    for question, group in groups.items():
        if group[0].index != question:
            raise SampleInvalid(f"{group[0].where}: index {group[0].index}: the table lacks its question {question}")
    published = len(groups) < len(rows)
    return [group if published else _rotated(group[0]) for group in groups.values()]


def _rotated(row: Row) -> list[Row]:
    """The question with its options moved on by none, one, two … places, as LLaVA's script moves them."""
    options = _options(row)
    letters, texts = list(options), list(options.values())
    found = []
    for turn in range(len(letters)):
        index = row.index + turn * OFFSET
        fields = {**row.fields, **dict(zip(letters, texts[turn:] + texts[:turn], strict=True)), "index": str(index)}
        if row.fields.get("answer") in options:
            fields["answer"] = letters[(letters.index(row.fields["answer"]) - turn) % len(letters)]
        found.append(Row(row.where, index, fields))
    return found


def _item(row: Row, image: bytes, rotations: int) -> Item:
    options, right = _options(row), _text(row, "answer")
    if right and right not in options:
        raise SampleInvalid(f"{row.where}: `answer`: expected one of {', '.join(options)}, got {shown(right)}")
    question = take(row.fields, row.where, "question", str)
    lines = [_text(row, "hint"), question, *(f"{name}. {text}" for name, text in options.items()), PROMPT]
    kept = {name: _text(row, name) for name in COLUMNS}
    choice = Choice(options, right or None, row.index % OFFSET, rotations, kept)
    return Item(str(row.index), "\n".join(filter(None, lines)), (image,), choice, _text(row, "l2-category") or None)


def _options(row: Row) -> dict[str, str]:
    """The options by letter, up to the first one that is missing."""
    found = dict(takewhile(lambda option: option[1], ((name, _text(row, name)) for name in LETTERS)))
    if len(found) < 2:
        raise SampleInvalid(f"{row.where}: `A`, `B`: expected at least two options, got {len(found)}")
    return found


def _text(row: Row, name: str) -> str:
    """A field's text, empty where it is missing or says so."""
    text = row.fields.get(name) or ""
    return "" if text in MISSING or text.lower() in MISSING_ANY_CASE else text


class _Pictures:
    """The pictures of the rows, each decoded once for all rotations that show it."""

    def __init__(self, rows: Mapping[int, Row]) -> None:
        self.rows = rows
        self.decoded: dict[str, bytes] = {}

    def of(self, row: Row) -> bytes:
        field = take(row.fields, row.where, "image", str)
        if len(field) <= REFERENCE and field.isdecimal():
            if int(field) not in self.rows:
                raise SampleInvalid(f"{row.where}: `image`: names row {field} for its picture; there is none")
            field = take(self.rows[int(field)].fields, row.where, "image", str)
        if field not in self.decoded:
            self.decoded[field] = _decoded(field, row.where)
        return self.decoded[field]


def _decoded(field: str, where: str) -> bytes:
    try:
        image = base64.b64decode("".join(field.split()), validate=True)
    except binascii.Error as error:
        raise SampleInvalid(f"{where}: `image`: is no picture in base64: {error}") from None
    if not image:
        raise SampleInvalid(f"{where}: `image`: is empty")
    return image


TASK = Task("mmbench", MAX_NEW_TOKENS, partial(read, circular=False), score)
CIRCULAR = Task("mmbench_circular", MAX_NEW_TOKENS, partial(read, circular=True), score, files)
