"""The teacher's own answers in place of the data's (pseudo-labels, arXiv 2408.15237)."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from pipeline.data.conversations import IMAGE, Conversation, Turn
from pipeline.data.encoding import Encoder
from pipeline.data.processors import load_processor
from pipeline.generation import Generation, Prompt, generate
from pipeline.models import load_model, pick_device
from schemas.config import AnswersConfig, TeacherConfig
from schemas.errors import SampleInvalid
from schemas.sections import Device

# A record with its image files.
Asked = tuple[Conversation, tuple[bytes, ...]]


class Answerer:
    """One teacher that answers conversations turn by turn, each turn with its own answers before it."""

    def __init__(
        self, teacher: TeacherConfig, config: AnswersConfig, encoder: Encoder, device: Device, batch: int
    ) -> None:
        self.config, self.encoder, self.batch = config, encoder, batch
        self.processor = load_processor(teacher)
        self.model = load_model(teacher, getattr(torch, config.dtype), pick_device(device))

    def answer(self, asked: Sequence[Asked], seed: int) -> list[Conversation | SampleInvalid]:
        """The conversations with the teacher's answers, in order; the error where there is no room for one.

        ``seed`` tells apart calls of one run, which would otherwise draw the same numbers.
        """
        found: list[Conversation | SampleInvalid] = [
            replace(c, turns=tuple(t for t in c.turns if t.role == "system")) for c, _ in asked
        ]
        questions = [[t for t in c.turns if t.role == "user"] for c, _ in asked]
        for number in range(max(map(len, questions), default=0)):
            prompts: dict[int, Prompt] = {}
            for i, mine in enumerate(questions):
                now = found[i]
                if isinstance(now, Conversation) and number < len(mine):
                    now = found[i] = replace(now, turns=(*now.turns, mine[number]))
                    try:
                        prompts[i] = self._prompt(now, asked[i][1])
                    except SampleInvalid as error:
                        found[i] = error
            how = Generation(
                self.batch,
                self.config.max_new_tokens,
                self.config.temperature,
                hash((self.config.seed, seed, number)) % 2**63,  # of whole numbers: the same in every process
            )
            said = generate(self.model, self.processor, list(prompts.values()), how)
            for i, text in zip(prompts, said, strict=True):
                now = found[i]
                assert isinstance(now, Conversation)
                found[i] = replace(now, turns=(*now.turns, Turn("assistant", text)))
        return found

    def _prompt(self, conversation: Conversation, images: tuple[bytes, ...]) -> Prompt:
        """The prompt of the last turn, with those of the conversation's images that it has come to."""
        mentioned = sum(t.text.count(IMAGE) for t in conversation.turns)
        ids = self.encoder.prompt_ids(conversation, images[:mentioned])
        if len(ids) >= self.encoder.max_length:
            raise SampleInvalid(
                f"{conversation.source}: record {conversation.record}: conversations: the question takes {len(ids)} "
                f"tokens, which leaves the teacher no room within max_length {self.encoder.max_length}"
            )
        return Prompt(ids, images[:mentioned])
