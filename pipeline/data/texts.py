"""Records in text: where those of a JSON list or of JSON Lines lie, and their values.

Reads a chunk at a time, so that a file may be larger than memory.
"""

import json
import re
from collections.abc import Iterator
from io import BufferedIOBase, BytesIO
from typing import Any

from schemas.errors import SampleInvalid

# Bytes of text read at once; a record that is not whole within the limit is no record.
CHUNK, LONGEST_RECORD = 1 << 20, 1 << 28
BLANKS = re.compile(r"[ \t\r\n]*")
BOM = b"\xef\xbb\xbf"
# What the json module raises: for broken text, for numbers of thousands of digits and for thousands of brackets.
BROKEN = (ValueError, RecursionError)


def line_values(text: bytes, first: int, where: str) -> list[Any]:
    """The values of the lines that are not blank, or the SampleInvalid that one is; the first is record ``first``."""
    lines = (line for line in BytesIO(text) if line.strip())
    return [_value(line, f"{where}: record {number}") for number, line in enumerate(lines, first)]


def list_values(text: bytes, first: int, where: str) -> list[Any]:
    """As ``line_values`` for elements of a JSON list, given with the commas between them.

    Raises:
        SampleInvalid: the text is no such elements.
    """
    whole = b"[%s]" % text
    try:
        found: list[Any] = json.loads(whole)
    except BROKEN:
        ranges = enumerate(elements(BytesIO(whole), where), first)
        found = [_value(whole[start:stop], f"{where}: record {number}") for number, (start, stop) in ranges]
    return found


def lines(file: BufferedIOBase) -> Iterator[tuple[int, int]]:
    """The byte range of each line that is not blank."""
    at = 0
    for line in file:
        if line.strip():
            yield at, at + len(line)
        at += len(line)


def elements(file: BufferedIOBase, where: str) -> Iterator[tuple[int, int]]:
    """The byte range of each element of a JSON list.

    Bytes are looked at as Latin-1, where a character is a byte: what is beyond ASCII stands inside strings only.
    """
    decoder = json.JSONDecoder()
    head = file.read(CHUNK)
    offset = len(BOM) if head.startswith(BOM) else 0
    text, at = head[offset:].decode("latin-1"), 0

    def more(least: int) -> bool:
        """Forgets what has been passed and reads on; False at the end."""
        nonlocal text, at, offset
        new = file.read(max(CHUNK, least))
        if new:
            text, offset, at = text[at:] + new.decode("latin-1"), offset + at, 0
        return bool(new)

    def peek() -> str:
        """The next character that is no blank, empty at the end."""
        nonlocal at
        while (at := BLANKS.match(text, at).end()) == len(text):  # type: ignore[union-attr]
            if not more(0):
                return ""
        return text[at]

    def end() -> int:
        """Where the element that begins here ends."""
        while True:
            stop, problem = None, SampleInvalid()
            try:
                stop = decoder.raw_decode(text, at)[1]
            except json.JSONDecodeError as error:
                problem = _broken(where, offset + error.pos, error.msg)
            except BROKEN as error:
                raise _broken(where, offset + at, str(error)) from None
            # twice as much each time, so that a long record is not scanned again for every chunk
            cut = stop in (None, len(text)) and len(text) - at <= LONGEST_RECORD
            if not cut or not more(len(text) - at):
                if stop is None:
                    raise problem
                return stop

    if peek() != "[":
        raise SampleInvalid(f"{where}: expected a JSON list of records")
    at += 1
    if peek() != "]":
        while True:
            peek()
            stop = end()
            yield offset + at, offset + stop
            at = stop
            if (character := peek()) == "]":
                break
            if character != ",":
                raise _broken(where, offset + at, "expected a comma or the list's end")
            at += 1
    at += 1
    if peek():
        raise _broken(where, offset + at, "there is more after the list's end")


def _broken(where: str, byte: int, what: str) -> SampleInvalid:
    return SampleInvalid(f"{where}: cannot be read as JSON: byte {byte}: {what}")


def _value(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except BROKEN as error:
        return SampleInvalid(f"{where}: cannot be read as JSON: {error}")
