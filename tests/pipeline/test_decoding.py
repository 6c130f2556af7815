from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, StableLmConfig, StableLmForCausalLM

from pipeline.decoding import engine as engine_module
from pipeline.decoding import prompts as prompts_module
from pipeline.decoding.engine import DecodingEngine
from pipeline.decoding.prompts import piece_length
from pipeline.decoding.timing import ENGINES, random_prompts
from pipeline.mixer import MAX_ELEMENTS
from pipeline.models import build_model, decoder
from pipeline.ops.opset import TORCH
from pipeline.states import RecurrentLayer
from pipeline.surgery import mixers, replace_layers
from schemas.layers import LayersConfig, plan_layers
from tests.decoders import COMMON, FAMILIES, IMAGE_TOKEN, SPECIAL, build, hybrid, tinyllava, tokens
from tests.tolerances import CACHED_LOGITS

NEW = 8
PLANS: list[tuple[int, ...]] = [(), (0,), (1, 3), (0, 1, 2, 3)]
# Every family by default as a GPU decodes it, with one plan; half a minute with the rest: every plan in four kinds of
# decoder, and steps over keys that grow.
ALWAYS = [pytest.param(family, (1, 3), True, id=f"{family}-static") for family in sorted(FAMILIES)]
OTHERS = [
    pytest.param(family, plan, static, marks=pytest.mark.slow)
    for family in sorted(FAMILIES)
    for plan in (PLANS if family in ("phi", "qwen3", "llava", "qwen2-vl") else [(1, 3)])
    for static in (False, True)
    if (plan, static) != ((1, 3), True)
]


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


def decoded(
    model: PreTrainedModel, prompts: torch.Tensor, mask: torch.Tensor | None = None, **how: Any
) -> torch.Tensor:
    inputs = {"input_ids": prompts} | ({} if mask is None else {"attention_mask": mask})
    return torch.stack(list(DecodingEngine(model, **how).tokens(inputs, NEW)), 1)


def generated(model: PreTrainedModel, prompts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What transformers says, left-padded."""
    how: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(input_ids=prompts, attention_mask=mask, **how)[:, prompts.shape[1] :]


@pytest.mark.parametrize(("family", "replaced", "static"), ALWAYS + OTHERS)
def test_engine_says_what_generate_says(family: str, replaced: tuple[int, ...], static: bool) -> None:
    model = contestant(family, replaced)
    prompts = random_prompts(model, 3, 17, seed=1)
    whole = torch.ones_like(prompts)
    padded = whole.clone()
    padded[0, :5], padded[2, :1] = 0, 0
    engine = DecodingEngine(model, static=static)
    for mask in (whole, padded, whole):  # one room for all
        said = torch.stack(list(engine.tokens({"input_ids": prompts, "attention_mask": mask}, NEW)), 1)
        assert torch.equal(said, generated(model, prompts, mask))


@pytest.mark.gpu
@pytest.mark.parametrize("replaced", [(), (1, 3)], ids=str)
@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_captured_steps_say_what_generate_says(family: str, replaced: tuple[int, ...]) -> None:
    """The same tokens, but where the model's own scores of the two lie within rounding of each other."""
    model = contestant(family, replaced).cuda()
    prompts = random_prompts(model, 3, 17, seed=1)
    whole = torch.ones_like(prompts)
    padded = whole.clone()
    padded[0, :5], padded[2, :1] = 0, 0
    engine = DecodingEngine(model)
    for mask in (whole, padded, whole):
        said = torch.stack(list(engine.tokens({"input_ids": prompts, "attention_mask": mask}, NEW)), 1)
        assert engine.room is not None
        assert engine.room.graph is not None
        expected = generated(model, prompts, mask).cpu()
        for row in (said != expected).any(1).nonzero()[:, 0].tolist():
            step = int((said != expected)[row].nonzero()[0, 0])
            until = torch.cat([prompts[row], expected[row, :step].to(prompts)])[int((mask[row] == 0).sum()) :]
            scores = model(input_ids=until[None], use_cache=False).logits[0, -1]
            between = scores[expected[row, step]] - scores[said[row, step]]
            assert between.abs() <= 2 * CACHED_LOGITS * scores.abs().max(), (row, step, float(between))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_layers_that_are_known_are_fused(family: str) -> None:
    engine = DecodingEngine(contestant(family, (1,)), static=True)
    engine.prepare({"input_ids": random_prompts(engine.model, 1, 4, seed=0)}, 8)
    assert engine.room is not None
    known = ("phi", "llama", "llama-grouped", "qwen2", "mistral", "llava", "llava-next", "llava-onevision")
    assert (engine.room.fused is not None) == (family in known)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_windows_are_kept(family: str, static: bool) -> None:
    model = contestant(family, ())
    config = decoder(model).config
    config.sliding_window = 6
    for layer in decoder(model).layers[::2]:
        layer.self_attn.sliding_window = 6
    if family == "gemma2":
        config.layer_types = ["sliding_attention", "full_attention"] * 2
    prompts = random_prompts(model, 2, 11, seed=6)
    whole = torch.ones_like(prompts)
    said = decoded(model, prompts, static=static)
    assert torch.equal(said, generated(model, prompts, whole))
    padded = whole.clone()
    padded[1, :4] = 0
    assert torch.equal(decoded(model, prompts, padded, static=static), generated(model, prompts, padded))


@pytest.mark.parametrize("replaced", PLANS)
@pytest.mark.parametrize("family", ["llama-grouped", "qwen3"])
def test_engine_says_what_a_model_without_a_cache_says(family: str, replaced: tuple[int, ...]) -> None:
    model = contestant(family, replaced)
    prompts = random_prompts(model, 2, 9, seed=2)
    assert torch.equal(decoded(model, prompts), stepwise(model, prompts, NEW))


@pytest.mark.parametrize("replaced", PLANS)
def test_pieces_of_the_prompt_change_no_token(replaced: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model = contestant("phi", replaced)
    prompts = random_prompts(model, 2, 17, seed=3)
    padded = torch.ones_like(prompts)
    padded[0, :7] = 0
    whole = [decoded(model, prompts, mask) for mask in (None, padded)]
    for piece in (1, 5):
        monkeypatch.setattr(engine_module, "piece_length", lambda *_, piece=piece: piece)
        assert all(torch.equal(decoded(model, prompts, m), w) for m, w in zip((None, padded), whole, strict=True))


@pytest.mark.parametrize("replaced", [(), (1, 3)])
def test_a_model_that_attends_in_its_own_code_keeps_its_own(replaced: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model: PreTrainedModel = StableLmForCausalLM(StableLmConfig(**COMMON)).eval()
    model = hybrid(model, replaced) if replaced else model
    assert not DecodingEngine(model, static=True).static
    prompts = random_prompts(model, 2, 11, seed=6)
    whole = torch.ones_like(prompts)
    padded = whole.clone()
    padded[1, :4] = 0
    for mask in (whole, padded):
        assert torch.equal(decoded(model, prompts, mask), generated(model, prompts, mask))


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_no_end_token_ends_a_timed_generation(name: str) -> None:
    model = contestant("llama", (1,))
    prompts = random_prompts(model, 1, 8, seed=4)
    said = ENGINES[name](model)(prompts, NEW).tokens
    model.generation_config.eos_token_id = int(said[0, 2])
    again = ENGINES[name](model)(prompts, NEW)
    assert torch.equal(again.tokens, said)
    assert again.tokens.shape == (1, NEW)
    assert again.first > 0 < again.rest


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_a_model_that_wants_other_sampling_is_still_greedy(name: str) -> None:
    model = contestant("llama", ())
    prompts = random_prompts(model, 1, 8, seed=5)
    plain = ENGINES[name](model)(prompts, NEW).tokens
    model.generation_config.repetition_penalty = 5.0
    assert torch.equal(ENGINES[name](model)(prompts, NEW).tokens, plain)


def test_draws_follow_the_distribution() -> None:
    model = contestant("llama", (1,))
    prompts = random_prompts(model, 1, 6, seed=7)
    expected = (model(input_ids=prompts).logits[0, -1].detach() / 2).softmax(-1)
    torch.manual_seed(0)
    engine = DecodingEngine(model, temperature=2.0)
    rows = prompts.expand(4000, -1)
    (drawn,) = engine.tokens({"input_ids": rows}, 1)
    shares = torch.bincount(drawn, minlength=len(expected)) / len(rows)
    # four standard deviations of a share
    assert ((shares - expected).abs() <= 4 * (expected * (1 - expected) / len(rows)).sqrt() + 1e-9).all()


@pytest.mark.parametrize("static", [False, True])
def test_room_does_not_move_and_is_used_again(static: bool) -> None:
    model = contestant("phi", (0, 2))
    engine, places = DecodingEngine(model, static=static), set()
    for length, slots in ((9, 30), (5, 30), (17, 0)):
        prompts = random_prompts(model, 2, length, seed=length)
        said = torch.stack(list(engine.tokens({"input_ids": prompts}, NEW, slots)), 1)
        assert torch.equal(said, decoded(model, prompts))
        assert engine.room is not None
        layers = engine.room.cache.layers
        states = [layer.recurrent_states[0] if isinstance(layer, RecurrentLayer) else layer.keys for layer in layers]
        places.add(tuple(t.data_ptr() for t in states))
        assert [isinstance(layer, RecurrentLayer) for layer in layers] == [True, False, True, False]
    assert len(places) == 1


def test_the_models_own_attention_is_back_after_each_call() -> None:
    model = contestant("llava", (1,))
    own = decoder(model).config._attn_implementation
    tokens = DecodingEngine(model).tokens({"input_ids": random_prompts(model, 1, 5, seed=0)}, NEW)
    next(tokens)
    assert decoder(model).config._attn_implementation == own != "decant"
    expected = model(input_ids=torch.arange(1, 6)[None]).logits
    tokens.close()
    assert torch.equal(model(input_ids=torch.arange(1, 6)[None]).logits, expected)


def test_teacher_and_student_read_prompts_in_the_same_pieces_within_the_kernels_reach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with torch.device("meta"):
        teacher, student = (build_model(tinyllava(), torch.bfloat16) for _ in range(2))
        replace_layers(student, plan_layers(LayersConfig(ratio=0.25), 32), bias=True, ops=TORCH)
    width = mixers(student)[0].dims.width
    assert width == 10272
    for batch in (1, 16, 64, 100000):
        piece = piece_length(student, batch, 4096)
        assert piece == piece_length(teacher, batch, 4096) >= 1
        assert batch * piece * width <= MAX_ELEMENTS or piece == 1
    monkeypatch.setattr(prompts_module, "ACTIVATIONS", 1e12)
    monkeypatch.setattr(prompts_module, "MASK_ELEMENTS", 2**50)
    everything = piece_length(student, 1, 4096)
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
    said = decoded(model, prompts)
    assert not torch.equal(said[0], said[1])
    assert len(set(said.flatten().tolist())) > 3
