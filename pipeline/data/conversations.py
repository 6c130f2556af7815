"""Conversations in the LLaVA format, and precisely what is wrong with a record that cannot be used.

A record is ``{id, image?, conversations: [{from, value}]}``; in Parquet, ``image`` may be bytes and ``conversations``
JSON text.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.data.records import Part, parts, read_part
from schemas.errors import SampleInvalid

# Records read at once where one process reads them all.
PART = 256
IMAGE = "<image>"
ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Turn:
    """One turn; ``role`` is ``user`` or ``assistant``."""

    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """One valid record: turns alternate from user to assistant and end with an answer; ``image`` is a path or bytes."""

    source: str
    record: str
    image: str | bytes | None
    turns: tuple[Turn, ...]
    extra: dict[str, Any]


def read_conversations(path: str) -> Iterator[Conversation]:
    """The file's conversations in order.

    Raises:
        SampleInvalid: the file is missing, unreadable or empty, or a record is not a usable conversation.
    """
    for part in parts(path, PART):
        for item in part_conversations(path, part):
            if isinstance(item, SampleInvalid):
                raise item
            yield item


def part_conversations(path: str, part: Part) -> list[Conversation | SampleInvalid]:
    """The records of a part of the file, in order, each as a conversation or as the error that it is."""
    found: list[Conversation | SampleInvalid] = []
    for index, record in enumerate(read_part(path, part), part.first):
        try:
            found.append(record if isinstance(record, SampleInvalid) else parse(record, path, index))
        except SampleInvalid as error:
            found.append(error)
    return found


def parse(record: Any, source: str, index: int) -> Conversation:
    """One record as a conversation; ``source`` and ``index`` are for the error's text."""
    if not isinstance(record, dict):
        raise SampleInvalid(f"{source}: record {index}: expected an object, got {type(record).__name__}")
    name = str(record.get("id", index))
    where = f"{source}: record {index} (id {name})"
    image = record.get("image")
    if image is not None and not isinstance(image, str | bytes):
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
