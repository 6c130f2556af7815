"""One answer token by token: the tokens of transformers' ``generate()``, each when it is made."""

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.processors import Processor
from pipeline.generation import Generation, Prompt, generate, stream
from pipeline.models import decoder
from tests.decoders import FAMILIES, build, hybrid, tokens
from tests.teachers import build_tokenizer

# A vocabulary of single bytes, of which the models know the first 96.
PROCESSOR = Processor(build_tokenizer((), begins=False), None)
HOW = Generation(1, 8)
# One of each kind of mask and position always; with the others it takes ten seconds.
ALWAYS = ("phi", "gemma2", "qwen2-vl")
CASES = [family if family in ALWAYS else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]


def prompt(length: int = 7) -> Prompt:
    return Prompt(tokens(length)[0].numpy().astype(np.int32), ())


def text(ids: list[int]) -> str:
    return str(PROCESSOR.tokenizer.decode(ids, skip_special_tokens=True)).strip()


@pytest.fixture(autouse=True)
def _small_work(_threads: None) -> None:
    """Threads would wait for each other longer than they compute."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("family", CASES)
def test_greedy_tokens_are_generates(family: str) -> None:
    asked = prompt()
    for model in (build(family), hybrid(build(family), (1, 2)), hybrid(build(family), (0, 1, 2, 3))):
        model.generation_config.eos_token_id = None
        ids = torch.from_numpy(asked.ids)[None].long()
        whole = model.generate(ids, max_new_tokens=HOW.max_new_tokens, do_sample=False, pad_token_id=0)
        assert list(stream(model, PROCESSOR, asked, HOW)) == whole[0, ids.shape[1] :].tolist()


def test_draws_are_those_of_the_seed_and_leave_the_process_its_own() -> None:
    model, before = build("llama"), torch.get_rng_state()
    how = [Generation(1, 8, temperature=1.5, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (list(stream(model, PROCESSOR, prompt(), h)) for h in how)
    assert first == again != other
    assert text(first) == generate(model, PROCESSOR, [prompt()], how[0])[0]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_end_token_ends_and_is_left_out() -> None:
    model, asked = build("llama"), prompt()
    whole = list(stream(model, PROCESSOR, asked, HOW))
    end = whole[4]
    model.generation_config.eos_token_id = end
    assert list(stream(model, PROCESSOR, asked, HOW)) == whole[: whole.index(end)]


def test_each_token_is_given_before_later_ones_are_made() -> None:
    model, steps = build("llama"), []
    decoder(model).register_forward_pre_hook(lambda *_: steps.append(0))
    ids = stream(model, PROCESSOR, prompt(), HOW)
    for number, _ in enumerate(ids):
        # the prompt, and a step for each token given but the last; the next step is under way
        assert len(steps) == min(number + 2, HOW.max_new_tokens)


def test_closing_ends_the_work() -> None:
    model, steps = build("llama"), []
    decoder(model).register_forward_pre_hook(lambda *_: steps.append(0))
    ids = stream(model, PROCESSOR, prompt(), Generation(1, 400))
    next(ids)
    ids.close()
    assert len(steps) < 400


def test_a_failure_of_the_model_is_the_callers() -> None:
    model = build("llama")

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    decoder(model).register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        next(stream(model, PROCESSOR, prompt(), HOW))
