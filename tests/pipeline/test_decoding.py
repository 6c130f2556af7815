from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from pipeline.decoding import (
    ENGINES,
    ReservedLayer,
    decode,
    decode_by_generate,
    piece_length,
    random_prompts,
    reserved_cache,
)
from pipeline.mixer import MAX_ELEMENTS
from pipeline.models import build_model
from pipeline.ops.opset import TORCH
from pipeline.states import RecurrentLayer
from pipeline.surgery import mixers, replace_layers
from schemas.layers import LayersConfig, plan_layers
from tests.decoders import FAMILIES, IMAGE_TOKEN, SPECIAL, build, hybrid, tinyllava, tokens

NEW = 8
PLANS: list[tuple[int, ...]] = [(), (0,), (1, 3), (0, 1, 2, 3)]
# Every plan in four kinds of decoder, one in the others.
PAIRS = [(f, p) for f in sorted(FAMILIES) for p in PLANS if f in ("phi", "qwen3", "llava", "qwen2-vl") or p == (1, 3)]


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    """Threads would wait for each other longer than they compute."""
    torch.set_num_threads(1)


def contestant(family: str, replaced: tuple[int, ...]) -> PreTrainedModel:
    model = build(family)
    return hybrid(model, replaced) if replaced else model


def stepwise(model: PreTrainedModel, prompts: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy tokens with no cache at all: every token from the whole text before it."""
    ids = prompts
    for _ in range(new_tokens):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[:, prompts.shape[1] :]


@pytest.mark.parametrize(("family", "replaced"), PAIRS)
def test_loop_says_what_generate_says(family: str, replaced: tuple[int, ...]) -> None:
    model = contestant(family, replaced)
    prompts = random_prompts(model, 2, 17, seed=1)
    assert torch.equal(decode(model, prompts, NEW).tokens, decode_by_generate(model, prompts, NEW).tokens)


@pytest.mark.parametrize("replaced", PLANS)
@pytest.mark.parametrize("family", ["llama-grouped", "qwen3"])
def test_loop_says_what_a_model_without_a_cache_says(family: str, replaced: tuple[int, ...]) -> None:
    model = contestant(family, replaced)
    prompts = random_prompts(model, 2, 9, seed=2)
    assert torch.equal(decode(model, prompts, NEW).tokens, stepwise(model, prompts, NEW))


@pytest.mark.parametrize("replaced", PLANS)
def test_pieces_of_the_prompt_change_no_token(replaced: tuple[int, ...]) -> None:
    model = contestant("phi", replaced)
    prompts = random_prompts(model, 2, 17, seed=3)
    whole = decode(model, prompts, NEW, piece=17).tokens
    for piece in (1, 5):
        assert torch.equal(decode(model, prompts, NEW, piece=piece).tokens, whole)


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_no_end_token_ends_a_generation(engine: str) -> None:
    model = contestant("llama", (1,))
    prompts = random_prompts(model, 1, 8, seed=4)
    said = ENGINES[engine](model, prompts, NEW).tokens
    model.generation_config.eos_token_id = int(said[0, 2])
    again = ENGINES[engine](model, prompts, NEW)
    assert torch.equal(again.tokens, said)
    assert again.tokens.shape == (1, NEW)
    assert again.first > 0 < again.rest


def test_a_model_that_wants_other_sampling_is_still_greedy() -> None:
    model = contestant("llama", ())
    prompts = random_prompts(model, 1, 8, seed=5)
    plain = decode_by_generate(model, prompts, NEW).tokens
    model.generation_config.repetition_penalty = 5.0
    assert torch.equal(decode_by_generate(model, prompts, NEW).tokens, plain)


def test_reserved_room_gives_what_a_growing_layer_gives_and_does_not_move() -> None:
    reserved, growing = ReservedLayer(9), DynamicLayer()
    generator, places = torch.Generator().manual_seed(0), set()
    for count in (4, 1, 3, 1):
        keys, values = (torch.randn(2, 3, count, 5, generator=generator) for _ in range(2))
        for found, expected in zip(reserved.update(keys, values), growing.update(keys, values), strict=True):
            assert torch.equal(found, expected)
        assert reserved.get_seq_length() == growing.get_seq_length()
        assert reserved.get_mask_sizes(2) == growing.get_mask_sizes(2)
        places.add(reserved.keys.data_ptr())
    assert len(places) == 1
    with pytest.raises(AssertionError, match="room"):
        reserved.update(keys, values)


def test_cache_has_room_for_kept_layers_and_states_for_mixers() -> None:
    model = contestant("phi", (0, 2))
    kinds = [type(layer) for layer in reserved_cache(model, 32).layers]
    assert kinds == [RecurrentLayer, ReservedLayer, RecurrentLayer, ReservedLayer]
    assert isinstance(reserved_cache(model, 32), DynamicCache)


def test_layers_with_a_window_keep_their_own_cache() -> None:
    model = contestant("mistral", ())
    model.config.sliding_window = 6
    assert not any(isinstance(layer, ReservedLayer) for layer in reserved_cache(model, 32).layers)
    prompts = random_prompts(model, 2, 11, seed=6)
    assert torch.equal(decode(model, prompts, NEW, piece=4).tokens, decode_by_generate(model, prompts, NEW).tokens)


def test_teacher_and_student_read_prompts_in_the_same_pieces_within_the_kernels_reach() -> None:
    with torch.device("meta"):
        teacher, student = (build_model(tinyllava(), torch.bfloat16) for _ in range(2))
        replace_layers(student, plan_layers(LayersConfig(ratio=0.25), 32), bias=True, ops=TORCH)
    width = mixers(student)[0].dims.width
    assert width == 10272
    for batch in (1, 16, 64, 100000):
        piece = piece_length(student, batch)
        assert piece == piece_length(teacher, batch) >= 1
    everything = piece_length(student, 1, tokens=2**40)
    assert everything * width <= MAX_ELEMENTS < (everything + 1) * width


def test_prompts_are_of_the_seed_and_hold_no_special_token() -> None:
    model = build("qwen2-vl")
    one, other = random_prompts(model, 3, 400, seed=1), random_prompts(model, 3, 400, seed=2)
    assert torch.equal(one, random_prompts(model, 3, 400, seed=1))
    assert not torch.equal(one, other)
    assert one.shape == (3, 400)
    assert not set(one.flatten().tolist()) & {*SPECIAL, 0, 1, 2}
    assert IMAGE_TOKEN not in one
    assert len(set(one.flatten().tolist())) > 80


def test_a_prompt_changes_the_answer() -> None:
    """Else all comparisons above would hold for a model that always says the same."""
    model = contestant("phi", (0,))
    prompts: Any = torch.stack(tokens(9, 9))
    said = decode(model, prompts, NEW).tokens
    assert not torch.equal(said[0], said[1])
    assert len(set(said.flatten().tolist())) > 3
