"""Evaluation: greedy answers in batches, exact match per group, and held-out KL, alike for teacher and student."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.data.collate import predicting_positions
from pipeline.data.conversations import read_conversations
from pipeline.data.encoding import EncodedSample, Encoder
from pipeline.data.images import read_images
from pipeline.data.processors import Processor
from pipeline.generation import Generation, Prompt, generate, model_batch
from pipeline.losses import full_kl
from pipeline.models import body, logits_head
from pipeline.store import Store
from schemas.config import EvaluateConfig
from schemas.errors import SampleInvalid

# Two-sided 95 %.
Z95 = 1.959964
KL_CHUNK = 1024


@dataclass(frozen=True)
class Question:
    """One record to be answered: prompt ids, the reference answer, and the sample with its answer for the KL."""

    group: str | None
    prompt: np.ndarray
    reference: str
    sample: EncodedSample


@dataclass(frozen=True)
class Answers:
    """What one model makes of the questions: texts, and hidden states [P, D] at the references' positions."""

    texts: list[str]
    hidden: np.ndarray


def read_questions(config: EvaluateConfig, encoder: Encoder) -> list[Question]:
    """The evaluation file's questions, in order."""
    questions: list[Question] = []
    images = Store(config.images)
    for conversation in read_conversations(config.data):
        if config.limit is not None and len(questions) == config.limit:
            break
        group = None
        if config.group_by is not None:
            if config.group_by not in conversation.extra:
                raise SampleInvalid(
                    f"{conversation.source}: record {conversation.record}: has no field `{config.group_by}` "
                    "(evaluate.group_by)"
                )
            group = str(conversation.extra[config.group_by])
        files = read_images(conversation, images, truncated="refuse")
        prompt, sample = encoder.prompt_ids(conversation, files), encoder.encode(conversation, files)
        questions.append(Question(group, prompt, conversation.turns[-1].text.strip(), sample))
    return questions


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    processor: Processor,
    questions: Sequence[Question],
    batch: int,
    max_new_tokens: int,
    progress: Callable[[int], None],
) -> Answers:
    """Greedy answers to the questions, and the hidden states for the KL."""
    prompts = [Prompt(q.prompt, q.sample.images) for q in questions]
    texts = generate(model, processor, prompts, Generation(batch, max_new_tokens), progress)
    hidden: list[Tensor] = []
    for at in range(0, len(questions), batch):
        rows = [q.sample for q in questions[at : at + batch]]
        forced = model_batch(model, processor, [Prompt(r.input_ids, r.images) for r in rows], left=False)
        states = body(model)(**forced, use_cache=False).last_hidden_state
        for row, state in zip(rows, states, strict=True):
            positions = torch.from_numpy(predicting_positions(row.spans)).to(state.device)
            hidden.append(state[positions].float().cpu())
    return Answers(texts, torch.cat(hidden).numpy())


def score(questions: Sequence[Question], texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Exact match overall and per group: ``value``, ``n`` and the 95 % Wilson interval ``ci95``."""
    hits = [t == q.reference for q, t in zip(questions, texts, strict=True)]
    groups = sorted({q.group for q in questions if q.group is not None})
    result = {"overall": proportion(sum(hits), len(hits))}
    for group in groups:
        inside = [hit for hit, q in zip(hits, questions, strict=True) if q.group == group]
        result[group] = proportion(sum(inside), len(inside))
    return result


def proportion(hits: int, n: int) -> dict[str, Any]:
    """A proportion with its 95 % interval (Wilson 1927), which stays within [0, 1] also at the ends."""
    p = hits / n
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    # at 0 and 1 the interval ends at the proportion, which rounding must not put outside
    return {"value": p, "n": n, "ci95": [max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))]}


@torch.no_grad()
def held_out_kl(teacher: PreTrainedModel, teacher_hidden_PD: np.ndarray, student_hidden_PD: np.ndarray) -> float:
    """Mean KL(teacher ‖ student) over the references' positions, in nats, through the head that both share."""
    output = logits_head(teacher)
    total = 0.0
    for at in range(0, len(teacher_hidden_PD), KL_CHUNK):
        both = [
            output(torch.tensor(h[at : at + KL_CHUNK]).to(teacher.device, teacher.dtype))
            for h in (teacher_hidden_PD, student_hidden_PD)
        ]
        total += float(full_kl(*both).sum())
    return total / len(teacher_hidden_PD)
