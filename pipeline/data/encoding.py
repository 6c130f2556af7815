"""Turns a conversation and its images into token ids, supervised spans and, for generation, a prompt.

Owns the mapping from answers to token spans, the number of image positions, and what a maximum length cuts.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.conversations import Conversation
from pipeline.data.images import decode_image
from pipeline.data.processors import Processor
from pipeline.data.rendering import Renderer
from schemas.canonical import digest
from schemas.config import TemplateName
from schemas.errors import ConfigInvalid, SampleInvalid, shown

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class EncodedSample:
    """``input_ids`` int32[tokens]; ``spans`` int32[spans, 2]: token ranges [start, stop) of answers and end tokens.

    ``images`` are image files' bytes, in the order of their positions. ``cut`` tokens did not fit, of them
    ``cut_response`` supervised ones.
    """

    sample_id: str
    record: str
    input_ids: np.ndarray
    spans: np.ndarray
    images: tuple[bytes, ...] = ()
    cut: int = 0
    cut_response: int = 0

    @property
    def response_tokens(self) -> int:
        """Number of supervised tokens."""
        return count_tokens(self.spans)


def count_tokens(spans: np.ndarray | Spans) -> int:
    """How many tokens are in some spans."""
    return sum(int(stop) - int(start) for start, stop in spans)


class Encoder:
    """Encodes with one processor and chat template."""

    def __init__(self, processor: Processor, max_length: int, template: TemplateName = "own") -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.max_length = max_length
        if not self.tokenizer.is_fast:
            raise ConfigInvalid("teacher.path: the tokenizer has no fast version, which maps text to token spans")
        self.renderer = Renderer(processor, template)

    def encode(self, conversation: Conversation, images: Sequence[bytes]) -> EncodedSample:
        """The whole conversation, answers supervised.

        Raises:
            SampleInvalid: nothing of an answer is left within ``max_length``, an image would be cut, or the template
                has no place for the images.
        """
        try:
            return self._encode(conversation, images)
        except SampleInvalid as error:
            raise SampleInvalid(f"{_where(conversation)}: {error}") from None

    def prompt_ids(self, conversation: Conversation, images: Sequence[bytes]) -> np.ndarray:
        """Token ids of everything before the last answer, ready for generation.

        Raises:
            SampleInvalid: the template refuses the conversation or has no place for the images.
        """
        turns = conversation.turns[:-1] if conversation.turns[-1].role == "assistant" else conversation.turns
        try:
            return self._expand(self._tokens(self.renderer.prompt(turns), [])[0], [], images)[0]
        except SampleInvalid as error:
            raise SampleInvalid(f"{_where(conversation)}: {error}") from None

    def _encode(self, conversation: Conversation, images: Sequence[bytes]) -> EncodedSample:
        whole, spans = self._expand(*self._tokens(*self.renderer.whole(conversation.turns)), images)
        ids, kept = whole[: self.max_length], self._within(whole, spans)
        if not kept:
            raise SampleInvalid(f"conversations: no answer token within max_length {self.max_length} of {len(whole)}")
        content = {
            "turns": [[t.role, t.text] for t in conversation.turns],
            "images": [hashlib.sha256(image).hexdigest() for image in images],
            "ids": hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest(),
        }
        return EncodedSample(
            digest(content),
            conversation.record,
            ids,
            np.array(kept, np.int32).reshape(-1, 2),
            tuple(images),
            len(whole) - len(ids),
            count_tokens(spans) - count_tokens(kept),
        )

    def _tokens(self, text: str, answers: Spans) -> tuple[np.ndarray, Spans]:
        """Token ids of a rendered text, and the token spans of its answers."""
        begun = self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token)
        encoded = self.tokenizer(
            text, add_special_tokens=self.renderer.completes and not begun, return_offsets_mapping=True
        )
        offsets = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
        spans = (_token_span(offsets, start, stop) for start, stop in answers)
        return np.array(encoded["input_ids"], np.int32), [span for span in spans if span is not None]

    def _expand(self, ids: np.ndarray, spans: Spans, images: Sequence[bytes]) -> tuple[np.ndarray, Spans]:
        """Repeats each image token once per position of its image."""
        if images and self.processor.image_token_id is None:
            raise ConfigInvalid("teacher.path: the data has images, but this teacher's processor reads none")
        token = self.processor.image_token_id
        places = np.flatnonzero(ids == token) if token is not None else np.array([], np.int64)
        if len(places) != len(images):
            raise SampleInvalid(
                f"conversations: the chat template makes {len(places)} places of this one's {len(images)} images"
            )
        if not images:
            return ids, spans
        counts = self.processor.positions([decode_image(image).size for image in images])
        repeats = np.ones(len(ids), np.int64)
        repeats[places] = counts
        begins = np.concatenate([[0], np.cumsum(repeats)])
        return ids.repeat(repeats), [(int(begins[start]), int(begins[stop])) for start, stop in spans]

    def _within(self, ids: np.ndarray, spans: Spans) -> Spans:
        """The spans, or what is left of them, within the maximum length."""
        token = self.processor.image_token_id
        if token is not None and (ids[self.max_length :] == token).any():
            raise SampleInvalid(f"image: its positions do not fit into max_length {self.max_length}")
        return [(start, min(stop, self.max_length)) for start, stop in spans if start < self.max_length]


def _where(conversation: Conversation) -> str:
    return f"{conversation.source}: record {shown(conversation.record)}"


def _token_span(offsets: np.ndarray, start: int, stop: int) -> tuple[int, int] | None:
    """Tokens that end after ``start`` and begin before ``stop``; a blank merged into the answer's first one counts."""
    inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < stop))
    return (int(inside[0]), int(inside[-1]) + 1) if len(inside) else None
