"""Turns a conversation and its image into token ids, supervised spans and, for generation, a prompt.

Owns the rendering of the chat template, the mapping from answers to token spans, and the number of image positions.
"""

import hashlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.data.conversations import IMAGE, Conversation, Turn
from pipeline.store import Store
from schemas.canonical import digest
from schemas.errors import ConfigInvalid, SampleInvalid


@dataclass(frozen=True)
class EncodedSample:
    """``input_ids`` int32[tokens]; ``spans`` int32[spans, 2]: token ranges [start, stop) of answers and end tokens."""

    sample_id: str
    record: str
    input_ids: np.ndarray
    spans: np.ndarray
    image: bytes | None
    truncated: bool

    @property
    def response_tokens(self) -> int:
        """Number of supervised tokens."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())


def read_image(conversation: Conversation, images: Store) -> bytes | None:
    """The image file's bytes, None for a text-only record.

    Raises:
        SampleInvalid: the file is missing or is not an image that can be decoded.
        StoreUnavailable: object storage does not answer.
    """
    if conversation.image is None:
        return None
    where = f"{conversation.source}: record {conversation.record}: image"
    if isinstance(conversation.image, bytes):
        data = conversation.image
    else:
        where += f": {images.path(conversation.image)}"
        try:
            data = images.fetch(conversation.image)
        except OSError as error:
            raise SampleInvalid(f"{where}: {error.strerror or error}") from None
    try:
        decode_image(data)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SampleInvalid(f"{where}: cannot be decoded: {error}") from None
    return data


def decode_image(data: bytes) -> Image.Image:
    """Image bytes as RGB."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def image_token_of(processor: Any) -> int | None:
    """The token that stands for image positions, None for a text model."""
    found: int | None = getattr(processor, "image_token_id", None)
    return found


class Encoder:
    """Encodes with one processor (or, for a text model, tokenizer) and its chat template."""

    def __init__(self, processor: Any, max_length: int) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.max_length = max_length
        if not self.tokenizer.is_fast:
            raise ConfigInvalid("teacher.path: the tokenizer has no fast version, which maps text to token spans")
        self.image_token_id = image_token_of(processor)
        self._image_tokens: dict[tuple[int, int], int] = {}

    def encode(self, conversation: Conversation, image: bytes | None) -> EncodedSample:
        """The whole conversation, answers supervised.

        Raises:
            SampleInvalid: nothing of an answer is left within ``max_length``, or the image would be cut.
        """
        text, answers = self._render(conversation.turns)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = np.array(encoded["input_ids"], np.int32), np.array(encoded["offset_mapping"], np.int32)
        spans = [_token_span(offsets, start, stop) for start, stop in answers]
        ids, spans = self._expand(ids, spans, image)
        where = f"{conversation.source}: record {conversation.record}"
        truncated = len(ids) > self.max_length
        if truncated:
            ids, spans = self._truncate(ids, spans, where)
        if not spans:
            raise SampleInvalid(f"{where}: conversations: no answer token within max_length {self.max_length}")
        content = {
            "turns": [[t.role, t.text] for t in conversation.turns],
            "image": hashlib.sha256(image).hexdigest() if image is not None else None,
            "ids": hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest(),
        }
        return EncodedSample(
            digest(content), conversation.record, ids, np.array(spans, np.int32).reshape(-1, 2), image, truncated
        )

    def prompt_ids(self, conversation: Conversation, image: bytes | None) -> np.ndarray:
        """Token ids of everything before the last answer, ready for generation."""
        text = self._template(conversation.turns[:-1], prompt=True)
        ids = np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        return self._expand(ids, [], image)[0]

    def _template(self, turns: tuple[Turn, ...], *, prompt: bool) -> str:
        messages = [{"role": t.role, "content": t.text} for t in turns]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert isinstance(text, str)
        return text

    def _render(self, turns: tuple[Turn, ...]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation's text and the character range of each answer, from the template itself."""
        text, answers = self._template(turns, prompt=False), []
        for end in range(2, len(turns) + 1, 2):
            before = self._template(turns[: end - 1], prompt=True)
            after = self._template(turns[:end], prompt=False)
            if not (after.startswith(before) and text.startswith(after)):
                raise ConfigInvalid(
                    "teacher.path: the chat template renders the beginning of a conversation differently from the "
                    "whole, so answers cannot be located"
                )
            answers.append((len(before), len(after)))
        return text, answers

    def _expand(
        self, ids: np.ndarray, spans: list[tuple[int, int]], image: bytes | None
    ) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Repeats the image token once per image position."""
        if image is None:
            return ids, spans
        if self.image_token_id is None:
            raise ConfigInvalid("teacher.path: the data has images, but this teacher's processor reads none")
        (place,) = np.flatnonzero(ids == self.image_token_id)
        count = self._count(decode_image(image).size)
        ids = np.concatenate([ids[:place], np.full(count, self.image_token_id, ids.dtype), ids[place + 1 :]])
        return ids, [(s + count - 1, e + count - 1) if s > place else (s, e) for s, e in spans]

    def _count(self, size: tuple[int, int]) -> int:
        """Image positions for an image of (width, height), as the processor itself would place them."""
        if size not in self._image_tokens:
            ids = self.processor(text=[IMAGE], images=[Image.new("RGB", size)])["input_ids"][0]
            self._image_tokens[size] = int((np.array(ids) == self.image_token_id).sum())
        return self._image_tokens[size]

    def _truncate(
        self, ids: np.ndarray, spans: list[tuple[int, int]], where: str
    ) -> tuple[np.ndarray, list[tuple[int, int]]]:
        if self.image_token_id is not None and (ids[self.max_length :] == self.image_token_id).any():
            raise SampleInvalid(f"{where}: image: its positions do not fit into max_length {self.max_length}")
        return ids[: self.max_length], [(s, min(e, self.max_length)) for s, e in spans if s < self.max_length]


def _token_span(offsets: np.ndarray, start: int, stop: int) -> tuple[int, int]:
    """Tokens that end after ``start`` and begin before ``stop``; a blank merged into the answer's first one counts."""
    inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < stop))
    return int(inside[0]), int(inside[-1]) + 1
