"""Reads conversations in the LLaVA format and says precisely what is wrong with a record that cannot be used.

A file is a JSON list (``.json``), JSON Lines (``.jsonl``) or Parquet (``.parquet``) of
``{id, image?, conversations: [{from, value}]}``. In Parquet, ``image`` may be bytes and ``conversations`` JSON text.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import SampleInvalid

# Rows read at once from a Parquet file; with an image each, some hundred megabytes at most.
PARQUET_ROWS = 256
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
    for item in each_conversation(path):
        if isinstance(item, SampleInvalid):
            raise item
        yield item


def each_conversation(path: str) -> Iterator[Conversation | SampleInvalid]:
    """The file's records in order, each as a conversation or as the error that it is.

    Raises:
        SampleInvalid: the file is missing, unreadable or empty.
    """
    count = 0
    for index, record in enumerate(_records(Path(path))):
        count += 1
        try:
            found = record if isinstance(record, SampleInvalid) else parse(record, path, index)
        except SampleInvalid as error:
            found = error
        yield found
    if not count:
        raise SampleInvalid(f"{path}: the data set is empty; it must hold at least one record")


def _records(path: Path) -> Iterator[Any]:
    """The file's records; a line of JSON Lines that cannot be read comes as an error."""
    try:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                yield from (_line(line, f"{path}: line {n}") for n, line in enumerate(lines, 1) if line.strip())
            return
        if path.suffix == ".parquet":
            for batch in pq.ParquetFile(path).iter_batches(PARQUET_ROWS):
                yield from (_flat(row) for row in batch.to_pylist())
            return
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SampleInvalid(f"{path}: no such data file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, pa.ArrowException) as error:
        kind = "Parquet" if path.suffix == ".parquet" else "JSON"
        raise SampleInvalid(f"{path}: cannot be read as {kind}: {error}") from None
    if not isinstance(data, list):
        raise SampleInvalid(f"{path}: expected a JSON list of records, got {type(data).__name__}")
    yield from data


def _line(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return SampleInvalid(f"{where}: cannot be read as JSON: {error}")


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A Parquet row as a record: conversations may be JSON text, images structures of bytes and path."""
    image, turns = row.get("image"), row.get("conversations")
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(turns, str):
        turns = _line(turns, "conversations")
    return {**row, "image": image, "conversations": turns}


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
