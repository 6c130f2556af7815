"""What cannot be replaced is refused by name, with the reason and with what could be."""

from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MllamaConfig,
    MllamaForConditionalGeneration,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from pipeline.ops.opset import TORCH
from pipeline.surgery import mixer_dims, mixers, qk_gains, replace_layers
from schemas.errors import ConfigInvalid
from schemas.layers import LayerPlan
from tests.decoders import COMMON, FAMILIES, LAYERS, MULTI_HEAD, build, hybrid, tokens
from tests.tolerances import FLOAT32_LOGITS


def replace(model: PreTrainedModel, *layers: int) -> None:
    replace_layers(model, LayerPlan(LAYERS, layers), bias=False, ops=TORCH)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_any_plan_and_keeps_the_other_layers(family: str) -> None:
    for layers in [(3,), (0, 1), (0, 1, 2, 3)]:
        model = build(family)
        replace(model, *layers)
        assert tuple(mixers(model)) == layers


def test_sliding_window_layers_are_refused_by_name() -> None:
    types = ["sliding_attention", "full_attention"] * 2
    model = Gemma2ForCausalLM(Gemma2Config(**COMMON, head_dim=16, sliding_window=64, layer_types=types))
    with pytest.raises(
        ConfigInvalid, match=r"layer 0 \(Gemma2Attention sees the last 64 of up to 512 tokens.*\[1, 3\]"
    ):
        replace(model, 0, 1)
    assert not mixers(model), "a refused model is as it was"
    replace(model, 1, 3)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
@torch.no_grad()
def test_mixers_live_beside_sliding_windows(kind: str) -> None:
    """The masks of both kinds of attention keep their sizes, with a cache longer than the window."""
    settings: dict[str, Any] = {**COMMON, "head_dim": 16, "sliding_window": 4}
    settings["layer_types"] = ["sliding_attention", "full_attention"] * 2
    torch.manual_seed(0)
    model: PreTrainedModel = (
        Gemma2ForCausalLM(Gemma2Config(**settings))
        if kind == "gemma2"
        else Gemma3ForCausalLM(Gemma3TextConfig(**settings))
    )
    model = hybrid(model.eval(), (1,), "matvlm")
    ids = torch.stack(tokens(11, 11))
    out = model.generate(
        input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    whole = model(input_ids=out.sequences, use_cache=False).logits[:, 10:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), whole, rtol=FLOAT32_LOGITS, atol=FLOAT32_LOGITS)


def test_mistrals_window_counts_only_where_the_context_is_longer() -> None:
    with pytest.raises(ConfigInvalid, match=r"MistralAttention sees the last 64 .*set sliding_window to null"):
        replace(MistralForCausalLM(MistralConfig(**COMMON, sliding_window=64)), 1)
    replace(MistralForCausalLM(MistralConfig(**COMMON, sliding_window=512)), 1)


def test_cross_attention_layers_are_refused_by_name() -> None:
    config = MllamaConfig(
        text_config={**COMMON, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default"}},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 28,
            "supported_aspect_ratios": [[1, 1]],
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
        },
    )
    model = MllamaForConditionalGeneration(config)
    with pytest.raises(
        ConfigInvalid, match=r"layer 1 \(MllamaCrossAttentionDecoderLayer: cross-attention.*\[0, 2, 3\]"
    ):
        replace(model, 0, 1)


def test_models_of_another_build_are_refused() -> None:
    with pytest.raises(ConfigInvalid, match="GPT2LMHeadModel has no decoder of layers with self_attn"):
        replace(GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=16, n_head=2, vocab_size=96)), 0)


def test_encoders_are_refused() -> None:
    config = BartConfig(vocab_size=96, d_model=16, encoder_layers=4, decoder_layers=4, encoder_ffn_dim=16,
                        decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2)  # fmt: skip
    with pytest.raises(ConfigInvalid, match="BartForConditionalGeneration has no decoder of layers"):
        replace(BartForConditionalGeneration(config), 0)
    model = build("llama")
    model.model.layers[2].self_attn.is_causal = False
    with pytest.raises(ConfigInvalid, match=r"layer 2 \(LlamaAttention is an encoder's"):
        replace(model, 2)


def test_fused_projections_and_other_norms_are_refused() -> None:
    phi3 = Phi3ForCausalLM(Phi3Config(**COMMON, sliding_window=None))
    with pytest.raises(ConfigInvalid, match="Phi3Attention has no separate q, k, v and output projections"):
        replace(phi3, 0)
    with pytest.raises(ConfigInvalid, match="Olmo2Attention normalises queries and keys by Olmo2RMSNorm"):
        replace(Olmo2ForCausalLM(Olmo2Config(**COMMON)), 0)
    phi = PhiForCausalLM(PhiConfig(**MULTI_HEAD, qk_layernorm=True))
    with pytest.raises(ConfigInvalid, match="PhiAttention normalises queries and keys by LayerNorm"):
        replace(phi, 0)


def test_heads_that_do_not_divide_are_refused() -> None:
    model = build("llama")
    model.model.layers[0].self_attn.head_dim = 5
    with pytest.raises(ConfigInvalid, match="heads of 5 do not divide"):
        replace(model, 0)


def test_a_layer_is_not_replaced_twice() -> None:
    model = hybrid(build("llama"), (1,))
    with pytest.raises(ConfigInvalid, match=r"layer 1 \(already a Mamba-2 mixer\).*\[0, 2, 3\]"):
        replace(model, 1)


def test_plan_of_another_depth_is_refused() -> None:
    with pytest.raises(ConfigInvalid, match="made for 8 layers; the decoder has 4"):
        replace_layers(build("llama"), LayerPlan(8, (0,)), bias=False, ops=TORCH)


@pytest.mark.parametrize(("family", "offset"), [("qwen3", 0.0), ("gemma3", 1.0)])
def test_query_and_key_norms_are_read_by_what_they_do(family: str, offset: float) -> None:
    """Gemma's norms multiply by one more than their weight."""
    if family == "gemma3":
        model: PreTrainedModel = Gemma3ForCausalLM(
            Gemma3TextConfig(**COMMON, head_dim=16, layer_types=["full_attention"] * LAYERS)
        )
        torch.nn.init.normal_(model.model.layers[0].self_attn.q_norm.weight)
    else:
        model = build(family)
    attention = model.model.layers[0].self_attn
    gains = qk_gains(attention, 16)
    assert gains is not None
    torch.testing.assert_close(gains[0], attention.q_norm.weight.detach() + offset)
    assert mixer_dims(attention, bias=False).qk_norm


def test_hybrids_do_not_change_the_class_that_they_are_made_of() -> None:
    hybrid(build("llama"), (0,))
    assert not LlamaForCausalLM._is_stateful
