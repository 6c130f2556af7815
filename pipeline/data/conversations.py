"""Conversations as people write them, and precisely what is wrong with a record that cannot be used.

A record is ``{id?, image? | images?, conversations | messages}``. Turns are LLaVA's ``{from, value}`` or the chat form
``{role, content}``, whose content is a text or a list of parts. Images are paths, bytes, ``{bytes, path}`` or lists of
those. Turns may be JSON text, as tables hold them.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from pipeline.data.records import Part, parts, read_part, source_of
from schemas.errors import SampleInvalid, shown

# Records read at once where one process reads them all.
PART = 256
IMAGE = "<image>"
# The two ways to write a turn: who speaks, what is said, and the names of who speaks.
LLAVA = ("from", "value", {"human": "user", "gpt": "assistant", "system": "system"})
CHAT = ("role", "content", {"user": "user", "assistant": "assistant", "system": "system"})
TURN = "{from: human|gpt|system, value: text} or {role: user|assistant|system, content: text or parts}"


@dataclass(frozen=True)
class Turn:
    """One turn of ``system``, ``user`` or ``assistant``; in a user's text ``<image>`` stands where an image does."""

    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """One valid record: at most one system turn, then user and assistant in turn, from the user on.

    ``images`` are paths or bytes, as many as there are placeholders, in their order. ``source`` is for messages: the
    data file, without what may be secret in its URL.
    """

    source: str
    record: str
    images: tuple[str | bytes, ...]
    turns: tuple[Turn, ...]
    extra: dict[str, Any]


def read_conversations(path: str, *, answered: bool = True) -> Iterator[Conversation]:
    """The conversations of a data file or folder, in order; ``answered`` as for ``parse``.

    Raises:
        SampleInvalid: the file is missing, unreadable or empty, or a record is not a usable conversation.
    """
    for part in parts(path, PART):
        for item in part_conversations(path, part, answered=answered):
            if isinstance(item, SampleInvalid):
                raise item
            yield item


def part_conversations(path: str, part: Part, *, answered: bool = True) -> list[Conversation | SampleInvalid]:
    """The records of a part, in order, each as a conversation or as the error that it is."""
    where = source_of(path, part)

    def conversation(index: int, record: Any) -> Conversation | SampleInvalid:
        try:
            return record if isinstance(record, SampleInvalid) else parse(record, where, index, answered=answered)
        except SampleInvalid as error:
            return error

    return [conversation(index, record) for index, record in enumerate(read_part(path, part), part.first)]


def parse(record: Any, source: str, index: int, *, answered: bool = True) -> Conversation:
    """One record as a conversation; ``source`` and ``index`` are for the error's text.

    Args:
        record: the record as a JSON value.
        source: the data file.
        index: the record's number in it, from 0.
        answered: whether the last turn must be an answer. If not, the user may have the last turn and answers may be
            empty, because the teacher is to give them.

    Raises:
        SampleInvalid: the record is no such conversation.
    """
    if not isinstance(record, dict):
        raise SampleInvalid(f"{source}: record {index}: expected an object, got {type(record).__name__}")
    name = index if record.get("id") is None else record["id"]
    where = f"{source}: record {index} (id {shown(name)})"
    if not isinstance(name, str | int | float):
        raise SampleInvalid(f"{where}: id: expected a text or number, got {shown(name)}")
    name = _checked(str(name), f"{where}: id")
    images = _images(record, where)
    turns = _turns(record, where, answered=answered)
    mentions = sum(t.text.count(IMAGE) for t in turns)
    if mentions != len(images):
        raise SampleInvalid(
            f"{where}: conversations: {mentions} {IMAGE} placeholders for {len(images)} images; the numbers must agree"
        )
    used = ("id", "image", "images", "conversations", "messages")
    return Conversation(source, name, images, turns, {k: v for k, v in record.items() if k not in used})


def _field(record: dict[str, Any], names: tuple[str, str], where: str) -> tuple[str, Any]:
    """The one of two fields that the record has, and its value; the first one and None where it has neither."""
    given = [name for name in names if record.get(name) not in (None, [])]
    if len(given) > 1:
        raise SampleInvalid(f"{where}: {names[1]}: expected this or `{names[0]}`, got both")
    name = given[0] if given else names[0]
    return name, record.get(name)


def _images(record: dict[str, Any], where: str) -> tuple[str | bytes, ...]:
    field, value = _field(record, ("image", "images"), where)
    if value is None:
        return ()
    found = []
    for item in value if isinstance(value, list) else [value]:
        image = item
        if isinstance(item, dict):
            image = item.get("path") if item.get("bytes") is None else item["bytes"]
        if not isinstance(image, str | bytes):
            raise SampleInvalid(f"{where}: {field}: expected a path, bytes or a list of them, got {shown(value)}")
        found.append(_checked(image, f"{where}: {field}") if isinstance(image, str) else image)
    return tuple(found)


def _turns(record: dict[str, Any], where: str, *, answered: bool) -> tuple[Turn, ...]:
    field, value = _field(record, ("conversations", "messages"), where)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise SampleInvalid(f"{where}: {field}: cannot be read as JSON: {error}") from None
    if not isinstance(value, list) or not value:
        raise SampleInvalid(f"{where}: {field}: expected a list of turns, got {shown(value)}")
    turns = [_turn(turn, f"{where}: {field}.{n}", answered=answered) for n, turn in enumerate(value)]
    system = turns[:1] if turns[0].role == "system" else []
    rest = turns[len(system) :]
    if rest and rest[0].role == "assistant":
        rest = rest[1:]  # nobody asked for it; LLaVA's own code drops it as well
    for number, (turn, wanted) in enumerate(zip(rest, cycle(("user", "assistant"))), len(turns) - len(rest)):
        if turn.role != wanted:
            raise SampleInvalid(
                f"{where}: {field}.{number}: expected a turn of {wanted}, got one of {turn.role}: after a system turn, "
                "which may stand first, turns must alternate user (human), assistant (gpt), …"
            )
    if not rest:
        raise SampleInvalid(f"{where}: {field}: the conversation has no question (no turn is the user's)")
    if answered and (rest[-1].role != "assistant" or not rest[-1].text.strip()):
        raise SampleInvalid(
            f"{where}: {field}: the conversation has no answer (the last turn must be the assistant's, not empty)"
        )
    return (*system, *rest)


def _turn(turn: Any, where: str, *, answered: bool) -> Turn:
    if not isinstance(turn, dict):
        raise SampleInvalid(f"{where}: expected {TURN}, got {shown(turn)}")
    speaker, said, roles = CHAT if turn.get(LLAVA[0]) is None else LLAVA
    name, content = turn.get(speaker), turn.get(said)
    role = roles.get(name) if isinstance(name, str) else None
    if content is None and role == "assistant" and not answered:
        content = ""
    text = _text(content) if isinstance(content, list) and speaker == CHAT[0] else content
    if role is None or not isinstance(text, str):
        raise SampleInvalid(f"{where}: expected {TURN}, got {shown(turn)}")
    if role != "user" and IMAGE in text:
        raise SampleInvalid(f"{where}: {said}: {IMAGE} may stand in a user's turn only, got one in the {role}'s")
    return Turn(role, _checked(text, f"{where}: {said}"))


def _text(parts: list[Any]) -> str | None:
    """The parts of a content, a line each, images as placeholders; None where one is neither text nor image."""
    lines = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        line = IMAGE if kind == "image" else part.get("text") if kind == "text" else None
        if not isinstance(line, str):
            return None
        lines.append(line)
    return "\n".join(lines)


def _checked(text: str, where: str) -> str:
    """The text, unless it has halves of a surrogate pair, which JSON can spell and nothing can write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleInvalid(f"{where}: character {error.start} is half a surrogate pair, which is no text") from None
    return text
