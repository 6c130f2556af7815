"""A conversation's text and where its answers stand in it, both by the chat template itself.

An answer is found by rendering the conversation with a mark in its place, so nothing is ever searched for in what
people wrote: separators inside of texts do no harm.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from os.path import commonprefix
from typing import Any

from jinja2 import TemplateError

from pipeline.data.conversations import IMAGE, Turn
from pipeline.data.processors import Processor
from pipeline.data.templates import TEMPLATES
from schemas.config import TemplateName
from schemas.errors import ConfigInvalid, SampleInvalid

# Where an answer begins and ends, in characters; the end mark that the template puts after it is part of it.
Span = tuple[int, int]


class Renderer:
    """Renders with one template."""

    def __init__(self, processor: Processor, template: TemplateName) -> None:
        """``own`` is the template that the model ships.

        Raises:
            ConfigInvalid: it ships none.
        """
        self.tokenizer, self.image_token = processor.tokenizer, processor.image_token
        self.template = processor.template if template == "own" else TEMPLATES[template]
        if self.template is None:
            raise ConfigInvalid(
                f"prepare.template: the teacher ships no chat template; name the one that it was trained with: "
                f"{', '.join(TEMPLATES)}"
            )
        self.ends = sorted(t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special)
        self.takes_parts = template == "own" and self._takes_parts()
        # as transformers does: a processor adds the tokenizer's own tokens where the text does not begin with them
        self.completes = processor.whole is not None or template != "own"

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The text up to where the next answer begins."""
        return self._apply(turns, prompt=True)

    def whole(self, turns: Sequence[Turn]) -> tuple[str, list[Span]]:
        """The conversation's text and the span of each answer.

        Raises:
            SampleInvalid: the template refuses the conversation, or renders it so that answers cannot be told.
        """
        answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        seed = hashlib.sha256(repr(turns).encode()).hexdigest()[:16]
        marks = {i: f"\ue000{seed}-{i}\ue001" for i in answers}  # of the private use area: nobody has written them
        rest = [replace(turn, text=marks.get(i, turn.text)) for i, turn in enumerate(turns)]
        after = self._between(self._apply(rest), list(marks.values()))[1:]
        starts = []
        for i in answers:
            starts.append(len(self._between(self._apply(rest), [marks[i]])[0]))
            rest[i] = turns[i]
        text = self._apply(rest)
        # an answer ends where what follows it begins, which the mark in its place has shown
        stops = [at - len(piece) for at, piece in zip([*starts[1:], len(text)], after, strict=True)]
        found = list(zip(starts, stops, after, strict=True))
        if any(start > stop or not text.startswith(piece, stop) for start, stop, piece in found):
            raise SampleInvalid("conversations: the chat template changes these answers, so they cannot be located")
        return text, [(start, stop + self._end_mark(piece, after[-1])) for start, stop, piece in found]

    def has_end(self) -> bool:
        """Whether an answer ends with a special token, which a student then learns to end with."""
        turns = (Turn("user", "a"), Turn("assistant", "b"))
        text, ((start, stop),) = self.whole(turns)
        return any(text.endswith(end, start, stop) for end in self.ends)

    def _between(self, text: str, marks: Sequence[str]) -> list[str]:
        pieces, at = [], 0
        for mark in marks:
            if text.count(mark) != 1:
                raise SampleInvalid("conversations: the chat template leaves out or repeats answers of this one")
            stop = text.index(mark)
            pieces.append(text[at:stop])
            at = stop + len(mark)
        return [*pieces, text[at:]]

    def _end_mark(self, piece: str, last: str) -> int:
        """The length of what ends an answer: what the last one is followed by, up to the first special token."""
        common = len(commonprefix([piece, last]))  # noqa: RUF071 - character by character is meant
        found = [at + len(end) for end in self.ends if (at := piece.find(end, 0, common)) >= 0]
        return min(found, default=common)

    def _apply(self, turns: Sequence[Turn], *, prompt: bool = False) -> str:
        messages = [{"role": t.role, "content": self._content(t.text)} for t in turns]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, TypeError) as error:
            raise SampleInvalid(f"conversations: the chat template refuses it: {error}") from None
        assert isinstance(text, str)
        return text

    def _content(self, text: str) -> str | list[dict[str, Any]]:
        """Text with image tokens, or parts for a template that places images itself."""
        if not self.takes_parts:
            return text.replace(IMAGE, self.image_token) if self.image_token else text
        first, *others = text.split(IMAGE)
        if not others:
            return [{"type": "text", "text": text}]
        # LLaVA's data put a line break between image and text, where such a template has its own way
        *between, end = others
        pieces = [first.removesuffix("\n"), *(piece.strip("\n") for piece in between), end.removeprefix("\n")]
        parts: list[dict[str, Any]] = []
        for number, piece in enumerate(pieces):
            parts += [{"type": "image"}] if number else []
            parts += [{"type": "text", "text": piece}] if piece else []
        return parts

    def _takes_parts(self) -> bool:
        """Whether the template takes a message in parts, found by giving it one."""
        if self.image_token is None:
            return False
        self.takes_parts = True
        try:
            text = self._apply([Turn("user", f"{IMAGE}\nprobe")])
        except SampleInvalid:
            return False
        return text.count(self.image_token) == 1 and "probe" in text and "'type'" not in text
