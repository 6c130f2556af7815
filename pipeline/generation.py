"""Answers by ``generate()``: left-padded batches of similar length, alike for teachers and students."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.data.collate import image_features, model_inputs, pad_tokens
from pipeline.data.processors import Processor


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


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    processor: Processor,
    prompts: Sequence[Prompt],
    how: Generation,
    progress: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """The answers in the prompts' order, without special tokens and blanks at either end.

    Draws are a function of the seed and of the prompts that are given together.
    """
    texts: dict[int, str] = {}
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), i))
    sampling: dict[str, Any] = {"do_sample": False}
    if how.temperature > 0:
        sampling = {"do_sample": True, "temperature": how.temperature, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(how.seed)
        for at in range(0, len(order), how.batch):
            chosen = order[at : at + how.batch]
            inputs = model_batch(model, processor, [prompts[i] for i in chosen], left=True)
            out = model.generate(
                **inputs,
                max_new_tokens=how.max_new_tokens,
                pad_token_id=processor.pad_id,
                eos_token_id=_end_ids(model, processor.tokenizer),
                **sampling,
            )
            said = processor.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            texts.update(zip(chosen, (t.strip() for t in said), strict=True))
            progress(at + len(chosen))
    return [texts[i] for i in range(len(prompts))]


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
