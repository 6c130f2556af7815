from importlib.util import find_spec

import pytest
import torch
from transformers import (
    GraniteMoeHybridConfig,
    LlavaForConditionalGeneration,
)
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer

import pipeline.mixer
from pipeline.mixer import FLOAT32, Mamba2Mixer
from pipeline.ops.opset import TORCH
from pipeline.student import build_student
from pipeline.surgery import mixers, replace_layers, trainable_names
from schemas.errors import ConfigInvalid
from schemas.hybrid import MixerDims
from schemas.layers import LayerPlan, LayersConfig, plan_layers
from tests.decoders import build, hybrid, randomise, tinyllava
from tests.tolerances import FLOAT32_LOGITS, FLOAT64

PHI2 = MixerDims(hidden=2560, heads=32, kv_heads=32, head_dim=80, bias=False)


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


@pytest.mark.parametrize(("ratio", "count"), [(0.125, 141_071_744), (0.25, 272_635_648), (0.5, 535_763_456)])
def test_tinyllava_trains_as_many_parameters_as_matvlm(ratio: float, count: int) -> None:
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(tinyllava())
        plan = plan_layers(LayersConfig(ratio=ratio), 32)
        replace_layers(model, plan, bias=False, ops=TORCH)
    assert sum(model.get_parameter(n).numel() for n in trainable_names(model)) == count


@pytest.mark.skipif(find_spec("causal_conv1d") is not None, reason="transformers would use its CUDA kernel")
def test_mixer_is_transformers_mamba2_layer_with_the_same_state_dict() -> None:
    """GraniteMoeHybrid's is stock Mamba-2 in torch, with one norm a group."""
    config = GraniteMoeHybridConfig(
        hidden_size=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_n_groups=4,
        mamba_d_state=8,
        mamba_expand=1,
        mamba_chunk_size=16,
        mamba_proj_bias=False,
        rms_norm_eps=1e-5,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    theirs = GraniteMoeHybridMambaLayer(config, 0).eval()
    ours = Mamba2Mixer(MixerDims(hidden=32, heads=4, kv_heads=4, head_dim=8, bias=False), 0).eval()
    randomise(ours, 0)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.manual_seed(0)
    for length in (1, 15, 40):
        u = torch.randn(2, length, 32)
        torch.testing.assert_close(ours(u)[0], theirs(u), rtol=FLOAT32_LOGITS, atol=FLOAT32_LOGITS)


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
    model = hybrid(build("phi"), (1,), init="random")
    before = {n: getattr(mixers(model)[1], n).detach().clone() for n in FLOAT32}
    model.to(torch.bfloat16)
    mixer = mixers(model)[1]
    assert mixer.in_proj.weight.dtype == torch.bfloat16
    for name, value in before.items():
        assert torch.equal(getattr(mixer, name), value)


def test_mixers_and_connector_train_and_nothing_else() -> None:
    model = hybrid(build("llava"), (1, 3))
    names = trainable_names(model)
    assert {n.split(".self_attn.")[0] for n in names if "self_attn" in n} == {
        "model.language_model.layers.1",
        "model.language_model.layers.3",
    }
    assert {n for n in names if "self_attn" not in n} == {
        f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }


def test_norms_and_feed_forward_of_replaced_layers_train_where_asked() -> None:
    model = hybrid(build("llama"), (2,))
    names = trainable_names(model, ("mixers", "connector", "norms", "mlp"))
    layer = "model.layers.2."
    assert all(n.startswith(layer) for n in names)
    assert {n.removeprefix(layer) for n in names if "self_attn" not in n} == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    }


@pytest.mark.parametrize("limit", [100, 400, 1000])
@pytest.mark.parametrize("packed", [False, True])
def test_too_many_elements_are_computed_in_pieces(monkeypatch: pytest.MonkeyPatch, limit: int, packed: bool) -> None:
    dims = MixerDims(hidden=8, heads=2, kv_heads=1, head_dim=4, bias=True)
    mixer = Mamba2Mixer(dims, 0).double()
    randomise(mixer, 0)
    torch.manual_seed(0)
    u = torch.randn(5, 12, 8, dtype=torch.float64)
    seq_idx = (torch.arange(12) >= torch.tensor([[3], [6], [7], [9], [11]])).long() if packed else None
    mask = None if packed else (torch.arange(12) >= torch.tensor([[3], [0], [7], [0], [11]])).long()
    whole = mixer(u, padding_mask=mask, seq_idx=seq_idx)[0]
    sizes = []
    conv = mixer.ops.conv

    def counted(x: torch.Tensor, *rest: object) -> object:
        sizes.append(x.shape[0] * x.shape[1] * dims.width)
        return conv(x, *rest)

    mixer.use(type(TORCH)("torch", TORCH.scan, counted, TORCH.step))  # type: ignore[arg-type]
    monkeypatch.setattr(pipeline.mixer, "MAX_ELEMENTS", limit)
    torch.testing.assert_close(mixer(u, padding_mask=mask, seq_idx=seq_idx)[0], whole, rtol=FLOAT64, atol=FLOAT64)
    assert max(sizes) <= limit
    assert len(sizes) > 1


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigInvalid, match="6 heads cannot share 4 key-value heads"):
        MixerDims(hidden=8, heads=6, kv_heads=4, head_dim=4, bias=True)


def test_student_is_reproducible_from_its_seed(tiny_teacher: object) -> None:
    def build(seed: int) -> dict[str, torch.Tensor]:
        model = build_student(
            str(tiny_teacher), LayerPlan(4, (1,)), "matvlm", seed, torch.float32, torch.device("cpu"), TORCH
        )
        return {n: p.clone() for n, p in mixers(model)[1].named_parameters()}

    first, again, other = build(0), build(0), build(1)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["conv1d.weight"], other["conv1d.weight"])
