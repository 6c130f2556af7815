"""Greedy generation with a clock: by our engine and by transformers' ``generate()``, for teachers and students alike.

Both take the same prompts, generate exactly so many tokens (no end token ends them) and have one signature, so that
another can stand beside them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from pipeline.decoding.engine import DecodingEngine
from pipeline.roofline import settled


@dataclass(frozen=True)
class Decoded:
    """Generated tokens [B, new], seconds until the first of each row was there, and seconds for all others."""

    tokens: Tensor
    first: float
    rest: float


# Generates so many tokens after prompts [B, L].
Run = Callable[[Tensor, int], Decoded]


def by_engine(model: PreTrainedModel) -> Run:
    """Engine ``decant``: what evaluation uses; its step is captured at a size's first run, before the clock starts."""
    engine = DecodingEngine(model)

    def run(prompts: Tensor, new_tokens: int) -> Decoded:
        engine.prepare({"input_ids": prompts}, prompts.shape[1] + new_tokens)
        begin, found = settled(model.device), []
        for token in engine.tokens({"input_ids": prompts}, new_tokens):
            found.append(token)
            if len(found) == 1:
                first = perf_counter()
        return Decoded(torch.stack(found, 1).to(model.device), first - begin, settled(model.device) - first)

    return run


class _FirstToken(StoppingCriteria):
    """Never stops; notes when it was first asked, which is after the first token."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002 - by name
        if self.at is None:
            self.at = settled(input_ids.device)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def by_generate(model: PreTrainedModel) -> Run:
    """Engine ``generate``: transformers' own, with its dynamic cache and the whole prompts in one call."""
    return partial(_by_generate, model)


@torch.no_grad()
def _by_generate(model: PreTrainedModel, prompts: Tensor, new_tokens: int) -> Decoded:
    clock = _FirstToken()
    begin = settled(model.device)
    out = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=None,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    end = settled(model.device)
    assert clock.at is not None
    return Decoded(out[:, prompts.shape[1] :], clock.at - begin, end - clock.at)


ENGINES: dict[str, Callable[[PreTrainedModel], Run]] = {"decant": by_engine, "generate": by_generate}


def random_prompts(model: PreTrainedModel, batch: int, length: int, seed: int) -> Tensor:
    """Token ids [batch, length] by seed, on the model's device: none of those with a meaning, such as an image's."""
    special = _special_ids(model.config) | _special_ids(model.config.get_text_config())
    vocabulary = model.get_input_embeddings().num_embeddings
    plain = torch.tensor([i for i in range(int(vocabulary)) if i not in special])
    chosen = torch.randint(len(plain), (batch, length), generator=torch.Generator().manual_seed(seed))
    return plain[chosen].to(model.device)


def _special_ids(config: Any) -> set[int]:
    """What the configuration names as some token's id."""
    named = [value for name, value in config.to_dict().items() if name.endswith(("token_id", "token_index"))]
    return {i for value in named for i in (value if isinstance(value, list) else [value]) if i is not None}
