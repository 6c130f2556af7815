"""Answers by the decoding engine: left-padded batches of similar length, alike for teachers and students."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.data.collate import image_features, model_inputs, pad_tokens
from pipeline.data.processors import Processor
from pipeline.decoding.engine import DecodingEngine


@dataclass(frozen=True)
class Prompt:
    """What is to be answered: token ids int32[tokens], and the image files in the order of their positions."""

    ids: np.ndarray
    images: tuple[bytes, ...]


@dataclass(frozen=True)
class Generation:
    """How answers are made: greedily at temperature 0, else drawn from the whole distribution at that temperature."""

    batch: int
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


def generate(
    model: PreTrainedModel,
    processor: Processor,
    prompts: Sequence[Prompt],
    how: Generation,
    progress: Callable[[int], None] = lambda _: None,
    engine: DecodingEngine | None = None,
) -> list[str]:
    """The answers in the prompts' order, without special tokens and blanks at either end.

    Draws are a function of the seed and of the prompts that are given together. Who asks several times gives the same
    ``engine``, of this model and temperature, each time.
    """
    texts: dict[int, str] = {}
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), i))
    engine = engine or DecodingEngine(model, how.temperature)
    most = max((len(p.ids) for p in prompts), default=0) + how.max_new_tokens
    with _drawing(model, how.seed):
        for at in range(0, len(order), how.batch):
            chosen = order[at : at + how.batch]
            # the last batch is filled up, as another size would be captured anew
            fill = [chosen[-1]] * (how.batch - len(chosen)) if engine.static and at else []
            said = _said(engine, processor, [prompts[i] for i in chosen + fill], how, most)[: len(chosen)]
            texts.update(zip(chosen, processor.tokenizer.batch_decode(said, skip_special_tokens=True), strict=True))
            progress(at + len(chosen))
    return [texts[i].strip() for i in range(len(prompts))]


def stream(model: PreTrainedModel, processor: Processor, prompt: Prompt, how: Generation) -> Generator[int, None, None]:
    """The token ids of the answer, one by one as they are made; the one that ends it is not among them.

    They are those of ``generate`` with this prompt alone. Closing the generator ends the work after the running step;
    until then torch's random numbers are the answer's.
    """
    ends = set(_end_ids(model, processor.tokenizer))
    inputs = model_batch(model, processor, [prompt], left=True)
    with _drawing(model, how.seed):
        for token in DecodingEngine(model, how.temperature).tokens(inputs, how.max_new_tokens):
            if int(token) in ends:
                return
            yield int(token)


def _said(
    engine: DecodingEngine, processor: Processor, prompts: Sequence[Prompt], how: Generation, most: int
) -> list[list[int]]:
    """Each prompt's answer up to its end token; stops when all have ended. No prompt needs more than ``most`` slots."""
    ends = set(_end_ids(engine.model, processor.tokenizer))
    inputs = model_batch(engine.model, processor, prompts, left=True)
    # of powers of two there are few, so that few rooms serve prompts of all lengths
    slots = min(most, 1 << (inputs["input_ids"].shape[1] + how.max_new_tokens - 1).bit_length())
    said, going = [list[int]() for _ in prompts], set(range(len(prompts)))
    for tokens in engine.tokens(inputs, how.max_new_tokens, slots):
        chosen = tokens.tolist()
        going -= {i for i in going if chosen[i] in ends}
        for i in going:
            said[i].append(chosen[i])
        if not going:
            break
    return said


@contextmanager
def _drawing(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """While open, draws follow from the seed; those of the process are as they were afterwards."""
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def model_batch(
    model: PreTrainedModel, processor: Processor, prompts: Sequence[Prompt], *, left: bool
) -> dict[str, Tensor]:
    """What the model takes for a batch, on its device and in its type."""
    ids, mask = pad_tokens([p.ids for p in prompts], processor.pad_id, left=left)
    features = [image_features(processor, p.images) for p in prompts]
    inputs = model_inputs(ids, features, processor.image_token_id) | {"attention_mask": mask}
    return {k: v.to(model.device, model.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}


def _end_ids(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: what the model's generation settings say, and the tokenizer's own."""
    said = model.generation_config.eos_token_id if model.generation_config else None
    found = said if isinstance(said, list) else [said]
    return [i for i in dict.fromkeys([*found, tokenizer.eos_token_id]) if i is not None]
