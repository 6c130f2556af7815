"""Every decoder family: the hybrid computes the same whichever way its tokens come in."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pipeline.data.collate import pad_tokens
from pipeline.models import body
from pipeline.student import save_hybrid
from schemas.errors import ConfigInvalid
from tests.decoders import (
    FAMILIES,
    IMAGE_TOKEN,
    LAYERS,
    SPECIAL,
    THREE_D,
    WITH_IMAGES,
    build,
    hybrid,
    image_prompt,
    tokens,
)
from tests.tolerances import CACHED_LOGITS, FLOAT64_LOGITS, PADDED_LOGITS

PLANS = [(0,), (1, 3), tuple(range(LAYERS))]


def same(got: Tensor, expected: Tensor, float32: float) -> None:
    bound = FLOAT64_LOGITS if expected.dtype == torch.float64 else float32
    torch.testing.assert_close(got, expected, rtol=bound, atol=bound)


def make(family: str, replaced: tuple[int, ...], dtype: torch.dtype) -> PreTrainedModel:
    """float64 takes rounding out of the comparison; `mimic` amplifies it, so float32 starts as `matvlm`."""
    if family == "gemma2" and dtype == torch.float64:
        pytest.skip("transformers' Gemma 2 gives NaN beside padding in float64, without mixers as well")
    return hybrid(build(family).to(dtype), replaced, "mimic" if dtype == torch.float64 else "matvlm")


DTYPE_PLANS = {torch.float32: (PLANS[1],), torch.float64: (PLANS[0], PLANS[2])}
cases = pytest.mark.parametrize(
    ("family", "replaced", "dtype"),
    [(f, r, d) for f in FAMILIES for d in DTYPE_PLANS for r in DTYPE_PLANS[d]],
    ids=lambda v: str(v).removeprefix("torch.") if not isinstance(v, tuple) else "-".join(map(str, v)),
)


@cases
@torch.no_grad()
def test_cached_tokens_and_chunked_prefill_give_the_uncached_logits(
    family: str, replaced: tuple[int, ...], dtype: torch.dtype
) -> None:
    model = make(family, replaced, dtype)
    ids = torch.stack(tokens(14, 14))
    whole = model(input_ids=ids).logits
    for cuts in ((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13), (6, 9, 10)):
        cache = DynamicCache(config=model.config)
        parts = [
            model(input_ids=piece, past_key_values=cache, use_cache=True).logits for piece in ids.tensor_split(cuts, 1)
        ]
        same(torch.cat(parts, 1), whole, CACHED_LOGITS)
        assert cache.get_seq_length() == 14


@cases
@torch.no_grad()
def test_left_padded_batch_gives_each_samples_own_logits(
    family: str, replaced: tuple[int, ...], dtype: torch.dtype
) -> None:
    model, rows = make(family, replaced, dtype), tokens(5, 11, 2)
    ids, mask = left_padded(rows)
    together = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    for i, row in enumerate(rows):
        same(together[i, -len(row) :], model(input_ids=row[None]).logits[0], PADDED_LOGITS)


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    width = max(len(r) for r in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, -len(row) :], mask[i, -len(row) :] = row, 1
    return ids, mask


@cases
@torch.no_grad()
def test_packed_sequences_give_each_ones_own_logits(family: str, replaced: tuple[int, ...], dtype: torch.dtype) -> None:
    model, rows = make(family, replaced, dtype), tokens(5, 11, 1, 4)
    positions = torch.cat([torch.arange(len(r)) for r in rows])[None]
    if family in THREE_D:  # text positions first, then time, height and width
        positions = positions[None].expand(4, 1, -1)
    packed = model(input_ids=torch.cat(rows)[None], position_ids=positions, use_cache=False).logits[0]
    alone = torch.cat([model(input_ids=r[None]).logits[0] for r in rows])
    same(packed, alone, PADDED_LOGITS)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_plan_of_no_layer_is_the_teacher_bit_for_bit(family: str) -> None:
    (ids,) = tokens(9)
    inputs = image_prompt(family, ids) if family in WITH_IMAGES else {"input_ids": ids[None]}
    teacher, student = build(family), hybrid(build(family), ())
    assert torch.equal(student(**inputs).logits, teacher(**inputs).logits)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_generate_gives_the_uncached_greedy_tokens(family: str) -> None:
    model, rows = hybrid(build(family), (0, 2), "matvlm"), tokens(5, 11, 2)
    ids, mask = left_padded(rows)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        suppress_tokens=SPECIAL,
    )
    for row, found in zip(rows, out, strict=True):
        assert found[-6:].tolist() == greedy(model, {"input_ids": row[None]}, 6)


@pytest.mark.parametrize("replaced", PLANS, ids=str)
@pytest.mark.parametrize("family", WITH_IMAGES)
@torch.no_grad()
def test_image_prompts_generate_as_without_a_cache(family: str, replaced: tuple[int, ...]) -> None:
    model = hybrid(build(family), replaced, "matvlm")
    inputs = image_prompt(family, tokens(5)[0])
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, suppress_tokens=SPECIAL)
    assert out[0, -6:].tolist() == greedy(model, inputs, 6)
    blank = {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
    assert not torch.allclose(model(**inputs).logits, model(**blank).logits, atol=1e-3), "the image does not count"


@pytest.mark.parametrize("family", WITH_IMAGES)
@torch.no_grad()
def test_left_padded_image_prompts_generate_as_each_alone(family: str) -> None:
    model = hybrid(build(family), (0, 2), "matvlm")
    single = [image_prompt(family, text) for text in tokens(3, 7)]
    ids, mask = left_padded([s["input_ids"][0] for s in single])
    together = {name: torch.cat([s[name] for s in single]) for name in single[0] if name not in PER_TOKEN}
    together |= {"input_ids": ids, "attention_mask": mask}
    if "mm_token_type_ids" in single[0]:
        together["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
    out = model.generate(
        **together, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0, suppress_tokens=SPECIAL
    )
    assert [row[-6:].tolist() for row in out] == [greedy(model, s, 6) for s in single]


PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids")


def greedy(model: PreTrainedModel, inputs: dict[str, Tensor], count: int) -> list[int]:
    """The next tokens, each from a forward over everything."""
    inputs = dict(inputs)
    for _ in range(count):
        logits = model(**inputs, use_cache=False).logits[:, -1:]
        logits[..., SPECIAL] = -torch.inf
        new = logits.argmax(-1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], new], 1)
        for name, filler in (("attention_mask", 1), ("mm_token_type_ids", 0)):
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], torch.full_like(inputs[name][:, :1], filler)], 1)
    return inputs["input_ids"][0, -count:].tolist()


MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_p": 0.9},
    "beams": {"num_beams": 3, "do_sample": False},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "several": {"num_return_sequences": 3, "do_sample": True},
    "chunked prefill": {"prefill_chunk_size": 4, "do_sample": False},
}


@pytest.mark.parametrize("replaced", PLANS[1:], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["phi", "qwen3"])
@torch.no_grad()
def test_every_way_to_generate_agrees_with_generation_without_a_cache(
    family: str, mode: str, replaced: tuple[int, ...]
) -> None:
    model = hybrid(build(family), replaced, "matvlm")
    ids, mask = left_padded(tokens(5, 11))
    settings = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0, **MODES[mode]}
    uncached = {k: v for k, v in settings.items() if k != "prefill_chunk_size"}
    torch.manual_seed(0)
    cached = model.generate(input_ids=ids, attention_mask=mask, **settings)
    torch.manual_seed(0)
    assert cached.tolist() == model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **uncached).tolist()


@torch.no_grad()
def test_a_conversation_goes_on_from_its_cache() -> None:
    model = hybrid(build("llama"), (0, 2), "matvlm")
    first, second = tokens(6, 4)
    cache = DynamicCache(config=model.config)
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    answer = model.generate(input_ids=first[None], past_key_values=cache, **settings)
    longer = torch.cat([answer, second[None]], 1)
    assert torch.equal(
        model.generate(input_ids=longer, past_key_values=cache, **settings),
        model.generate(input_ids=longer, **settings),
    )


@torch.no_grad()
def test_recurrent_state_is_float32_in_a_bfloat16_model() -> None:
    model = hybrid(build("phi"), (1,)).to(torch.bfloat16)
    cache = DynamicCache(config=model.config)
    for piece in tokens(5, 1):
        model(input_ids=piece[None], past_key_values=cache, use_cache=True)
    assert cache.layers[1].recurrent_states[0].dtype == torch.float32
    assert cache.layers[1].conv_states[0].dtype == torch.bfloat16


@torch.no_grad()
def test_caches_made_without_a_configuration_or_reset_work_as_well() -> None:
    (ids,) = tokens(8)
    # with attention beside them, some releases of transformers 5 keep zeroed keys after a reset
    for replaced, rounds in (((0, 3), 1), (tuple(range(LAYERS)), 2)):
        model, cache = hybrid(build("llama"), replaced, "matvlm"), DynamicCache()
        whole = model(input_ids=ids[None]).logits
        for _ in range(rounds):
            parts = [model(input_ids=p[None], past_key_values=cache, use_cache=True).logits for p in ids.split(3)]
            same(torch.cat(parts, 1), whole, CACHED_LOGITS)
            cache.reset()


def test_what_a_recurrence_cannot_do_is_refused_clearly() -> None:
    model, (ids,) = hybrid(build("llama"), (0,)), tokens(5)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(input_ids=ids[None], max_new_tokens=4, prompt_lookup_num_tokens=2)
    with pytest.raises(ConfigInvalid, match=r"static cache.*use the dynamic cache"):
        model.generate(input_ids=ids[None], max_new_tokens=2, cache_implementation="static", disable_compile=True)
    with pytest.raises(ConfigInvalid, match="2-D attention mask"):
        model(input_ids=ids[None], attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool))
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[None], past_key_values=cache, use_cache=True)
    with pytest.raises(RuntimeError, match="cannot forget"):
        cache.crop(-1)


def test_hidden_states_of_every_layer_are_still_given() -> None:
    model = hybrid(build("llama"), (1,))
    assert len(model(input_ids=tokens(5)[0][None], output_hidden_states=True).hidden_states) == LAYERS + 1


@pytest.mark.slow  # a process that builds every family; test_path loads an exported folder in a fresh one
@torch.no_grad()
def test_saved_hybrids_give_equal_logits_in_a_fresh_process(tmp_path: Path) -> None:
    (ids,) = tokens(9)
    expected = {}
    for family in FAMILIES:
        model = hybrid(build(family), (1, 3))
        save_hybrid(model, tmp_path / family)
        expected[family] = model(input_ids=ids[None]).logits
    code = f"""
import socket
def refused(*_, **__): raise AssertionError("reached for the network")
socket.socket.connect = refused
import torch
from pathlib import Path
from pipeline.student import load_hybrid
root, ids = Path({str(tmp_path)!r}), torch.tensor({[ids.tolist()]})
torch.set_grad_enabled(False)
logits = {{f.name: load_hybrid(f)(input_ids=ids).logits for f in sorted(root.iterdir()) if f.is_dir()}}
torch.save(logits, root / "logits.pt")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert found.keys() == expected.keys()
    for family, logits in expected.items():
        assert torch.equal(found[family], logits), family


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padding_on_the_right_needs_no_mask(family: str) -> None:
    """Training gives none: what follows a token is nothing that a causal model, mixers included, can see."""
    model = hybrid(build(family), (1, 2))
    rows = tokens(9, 5)
    ids, mask = pad_tokens([r.numpy() for r in rows], 0)
    alone = [body(model)(input_ids=r[None], use_cache=False).last_hidden_state[0] for r in rows]
    together = body(model)(input_ids=ids, use_cache=False).last_hidden_state
    for row, keep, expected in zip(together, mask, alone, strict=True):
        torch.testing.assert_close(row[keep == 1], expected, rtol=PADDED_LOGITS, atol=PADDED_LOGITS)
