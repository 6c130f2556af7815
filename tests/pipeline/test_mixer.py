import pytest
import torch
from transformers import PreTrainedModel

from pipeline.mixer import FLOAT32, Mamba2Mixer, MixerDims
from pipeline.models import decoder
from pipeline.ops.opset import TORCH
from pipeline.student import build_student
from pipeline.surgery import mixers, replace_layers, trainable_names
from schemas.layers import LayerPlan
from tests.conftest import tiny_model
from tests.tolerances import FLOAT32_LOGITS

PHI2 = MixerDims(hidden=2560, heads=32, kv_heads=32, head_dim=80, bias=False)


def hybrid(replaced: tuple[int, ...], init: str = "mimic") -> PreTrainedModel:
    from pipeline.initialise import initialise

    model = tiny_model()
    generator = torch.Generator().manual_seed(1)
    removed = replace_layers(model, LayerPlan(4, replaced), bias=init == "mimic", ops=TORCH)
    for index, attention in removed.items():
        initialise(mixers(model)[index], attention, init, generator)  # type: ignore[arg-type]
    return model


def prompts(lengths: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 80, (n,), generator=generator) for n in lengths]


def test_phi2_mixer_has_stock_mamba2s_parameters() -> None:
    with torch.device("meta"):
        mixer = Mamba2Mixer(PHI2, 0)
    shapes = {name: tuple(p.shape) for name, p in mixer.named_parameters()}
    assert shapes == {
        "in_proj.weight": (10272, 2560),
        "conv1d.weight": (7680, 1, 4),
        "conv1d.bias": (7680,),
        "dt_bias": (32,),
        "A_log": (32,),
        "D": (32,),
        "norm.weight": (2560,),
        "out_proj.weight": (2560, 2560),
    }
    assert sum(p.numel() for p in mixer.parameters()) == 32_890_976


@pytest.mark.parametrize("replaced", [(0,), (0, 2), (1, 2, 3)])
def test_left_padded_batch_gives_each_prompts_own_logits(replaced: tuple[int, ...]) -> None:
    model, rows = hybrid(replaced), prompts((5, 11, 2))
    ids, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 11 - len(row) :], mask[i, 11 - len(row) :] = row, 1
    together = model(input_ids=ids, attention_mask=mask).logits
    for i, row in enumerate(rows):
        alone = model(input_ids=row[None]).logits[0]
        torch.testing.assert_close(together[i, 11 - len(row) :], alone, rtol=FLOAT32_LOGITS, atol=FLOAT32_LOGITS)


@pytest.mark.parametrize("replaced", [(0,), (0, 2), (1, 2, 3)])
def test_cached_generation_gives_the_uncached_logits(replaced: tuple[int, ...]) -> None:
    model = hybrid(replaced)
    ids = torch.stack(prompts((6, 6)))
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=7,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    whole = model(input_ids=out.sequences).logits
    for t, logits in enumerate(out.logits):
        torch.testing.assert_close(logits, whole[:, 5 + t], rtol=FLOAT32_LOGITS, atol=FLOAT32_LOGITS)


def test_continuing_a_cache_by_several_tokens_gives_the_uncached_logits() -> None:
    from transformers import DynamicCache

    model = hybrid((0, 2))
    (ids,) = prompts((10,))
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[None, :4], past_key_values=cache, use_cache=True)
    rest = model(input_ids=ids[None, 4:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(rest, model(input_ids=ids[None]).logits[:, 4:], rtol=FLOAT32_LOGITS, atol=FLOAT32_LOGITS)


def test_grouped_queries_repeat_compact_x_and_b() -> None:
    compact = MixerDims(hidden=16, heads=4, kv_heads=2, head_dim=4, bias=False)
    full = MixerDims(hidden=16, heads=4, kv_heads=4, head_dim=4, bias=False)
    torch.manual_seed(0)
    small, large = Mamba2Mixer(compact, 0), Mamba2Mixer(full, 0)
    rows = torch.arange(8).view(2, 4).repeat_interleave(2, 0).flatten()
    with torch.no_grad():
        for name, p in large.named_parameters():
            p.copy_(small.get_parameter(name) if p.shape == small.get_parameter(name).shape else p)
        for block in ("z", "C", "dt"):
            large.in_proj.weight[full.rows[block]] = small.in_proj.weight[compact.rows[block]]
        for block in ("x", "B"):
            large.in_proj.weight[full.rows[block]] = small.in_proj.weight[compact.rows[block]][rows]
        channels = torch.cat([rows, 8 + rows, torch.arange(16, 32)])
        large.conv1d.weight.copy_(small.conv1d.weight[channels])
        large.conv1d.bias.copy_(small.conv1d.bias[channels])  # type: ignore[union-attr]
        u = torch.randn(2, 6, 16)
        torch.testing.assert_close(small(u)[0], large(u)[0])


def test_decay_parameters_stay_float32_to_the_bit_under_a_bfloat16_cast() -> None:
    model = hybrid((1,), init="random")
    before = {n: getattr(mixers(model)[1], n).detach().clone() for n in FLOAT32}
    model.to(torch.bfloat16)
    mixer = mixers(model)[1]
    assert mixer.in_proj.weight.dtype == torch.bfloat16
    for name, value in before.items():
        assert torch.equal(getattr(mixer, name), value)


def test_mixers_and_connector_train_and_nothing_else() -> None:
    model = hybrid((1, 3))
    names = trainable_names(model)
    assert {n.split(".self_attn.")[0] for n in names if "self_attn" in n} == {
        "model.language_model.layers.1",
        "model.language_model.layers.3",
    }
    assert {n for n in names if "self_attn" not in n} == {
        f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }
    assert decoder(model).config.layer_types == [  # type: ignore[union-attr]
        "full_attention",
        "linear_attention",
        "full_attention",
        "linear_attention",
    ]


def test_student_is_reproducible_from_its_seed(tiny_teacher: object) -> None:
    def build(seed: int) -> dict[str, torch.Tensor]:
        model = build_student(
            str(tiny_teacher), LayerPlan(4, (1,)), "matvlm", seed, torch.float32, torch.device("cpu"), TORCH
        )
        return {n: p.clone() for n, p in mixers(model)[1].named_parameters()}

    first, again, other = build(0), build(0), build(1)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["conv1d.weight"], other["conv1d.weight"])
