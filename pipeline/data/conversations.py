"""Reads conversations in the LLaVA format and says precisely what is wrong with a record that cannot be used.

A file is a JSON list (``.json``) or JSON Lines (``.jsonl``) of ``{id, image?, conversations: [{from, value}]}``.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.errors import SampleInvalid

IMAGE = "<image>"
ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Turn:
    """One turn; ``role`` is ``user`` or ``assistant``."""

    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """One valid record: turns alternate from user to assistant and end with an answer."""

    source: str
    record: str
    image: str | None
    turns: tuple[Turn, ...]
    extra: dict[str, Any]


def read_conversations(path: str) -> Iterator[Conversation]:
    """The file's conversations in order.

    Raises:
        SampleInvalid: the file is missing, unreadable or empty, or a record is not a usable conversation.
    """
    count = 0
    for index, record in enumerate(_records(Path(path))):
        yield parse(record, path, index)
        count += 1
    if not count:
        raise SampleInvalid(f"{path}: the data set is empty; it must hold at least one record")


def _records(path: Path) -> Iterator[Any]:
    try:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                yield from (json.loads(line) for line in lines if line.strip())
            return
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SampleInvalid(f"{path}: no such data file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SampleInvalid(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(data, list):
        raise SampleInvalid(f"{path}: expected a JSON list of records, got {type(data).__name__}")
    yield from data


def parse(record: Any, source: str, index: int) -> Conversation:
    """One record as a conversation; ``source`` and ``index`` are for the error's text."""
    if not isinstance(record, dict):
        raise SampleInvalid(f"{source}: record {index}: expected an object, got {type(record).__name__}")
    name = str(record.get("id", index))
    where = f"{source}: record {index} (id {name})"
    image = record.get("image")
    if image is not None and not isinstance(image, str):
        raise SampleInvalid(f"{where}: image: expected a path, got {image!r}")
    turns = _turns(record.get("conversations"), where)
    mentions = sum(t.text.count(IMAGE) for t in turns)
    if mentions != (1 if image is not None else 0):
        raise SampleInvalid(
            f"{where}: conversations: {mentions} {IMAGE} placeholders for "
            f"{'one image' if image is not None else 'no image'}; their numbers must agree"
        )
    extra = {k: v for k, v in record.items() if k not in ("id", "image", "conversations")}
    return Conversation(source, name, image, turns, extra)


def _turns(value: Any, where: str) -> tuple[Turn, ...]:
    if not isinstance(value, list) or not value:
        raise SampleInvalid(f"{where}: conversations: expected a list of turns, got {value!r}")
    turns = []
    for number, turn in enumerate(value):
        field = f"{where}: conversations.{number}"
        if not isinstance(turn, dict) or turn.get("from") not in ROLES or not isinstance(turn.get("value"), str):
            raise SampleInvalid(f"{field}: expected {{from: human|gpt, value: text}}, got {turn!r}")
        turns.append(Turn(ROLES[turn["from"]], turn["value"]))
    for number, done in enumerate(turns):
        wanted = "user" if number % 2 == 0 else "assistant"
        if done.role != wanted:
            raise SampleInvalid(f"{where}: conversations.{number}.from: turns must alternate human, gpt, …")
    if turns[-1].role != "assistant" or not turns[-1].text.strip():
        raise SampleInvalid(
            f"{where}: conversations: the conversation has no answer (last turn must be gpt, not empty)"
        )
    return tuple(turns)
