"""Tiny random models of every decoder family that Decant is tested on, alone and inside vision-language models.

And the configuration of one at its real size."""

from collections.abc import Callable
from typing import Any, cast

import torch
from transformers import (
    CLIPVisionConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
)

from pipeline.initialise import initialise
from pipeline.models import fuse_activations
from pipeline.ops.opset import TORCH, OpSet
from pipeline.student import has_bias, mark
from pipeline.surgery import mixers, replace_layers
from schemas.layers import LayerPlan

LAYERS, VOCABULARY, IMAGE_TOKEN = 4, 96, 95
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MULTI_HEAD = {**COMMON, "num_key_value_heads": 4}
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CLIP = CLIPVisionConfig(**TOWER)


def _gemma2() -> PreTrainedModel:
    types = ["full_attention"] * LAYERS
    return Gemma2ForCausalLM(Gemma2Config(**COMMON, head_dim=16, query_pre_attn_scalar=8, layer_types=types))


def _llava() -> PreTrainedModel:
    config = LlavaConfig(vision_config=CLIP, text_config=PhiConfig(**MULTI_HEAD), image_token_id=IMAGE_TOKEN)
    return LlavaForConditionalGeneration(config)


def _llava_next() -> PreTrainedModel:
    config = LlavaNextConfig(
        vision_config=CLIP,
        text_config=MistralConfig(**COMMON, sliding_window=None),
        image_token_id=IMAGE_TOKEN,
        image_grid_pinpoints=[[28, 28], [28, 56]],
    )
    return LlavaNextForConditionalGeneration(config)


def _onevision() -> PreTrainedModel:
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=Qwen2Config(**COMMON),
        image_token_id=IMAGE_TOKEN,
        video_token_id=94,
        image_grid_pinpoints=[[28, 28], [28, 56]],
    )
    return LlavaOnevisionForConditionalGeneration(config)


def _qwen_vl(config: Any, model: Any, **vision: Any) -> PreTrainedModel:
    made = config(
        text_config={**COMMON, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config={"depth": 2, "num_heads": 2, "patch_size": 14, **vision},
        image_token_id=IMAGE_TOKEN,
        video_token_id=94,
        vision_start_token_id=93,
        vision_end_token_id=92,
    )
    return cast(PreTrainedModel, model(made))


def _qwen2_vl() -> PreTrainedModel:
    sizes = {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    return _qwen_vl(Qwen2VLConfig, Qwen2VLForConditionalGeneration, **sizes)


def _qwen2_5_vl() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
    return _qwen_vl(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, **sizes)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "phi": lambda: PhiForCausalLM(PhiConfig(**MULTI_HEAD, partial_rotary_factor=0.5)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**MULTI_HEAD)),
    "llama-grouped": lambda: LlamaForCausalLM(LlamaConfig(**COMMON, attention_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**COMMON)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=16)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**COMMON, sliding_window=None)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**COMMON, head_dim=16)),
    "gemma2": _gemma2,
    "llava": _llava,
    "llava-next": _llava_next,
    "llava-onevision": _onevision,
    "qwen2-vl": _qwen2_vl,
    "qwen2.5-vl": _qwen2_5_vl,
}
# Whose positions come from images as well.
THREE_D = ("qwen2-vl", "qwen2.5-vl")
# What stands for images, which a random model would generate.
SPECIAL = [92, 93, 94, IMAGE_TOKEN]
WITH_IMAGES = ("llava", "llava-next", "llava-onevision", *THREE_D)


def build(family: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model with weights and biases large enough that whatever is wrong shows in the logits."""
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    fuse_activations(model)
    randomise(model, seed)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int) -> None:
    """Matrices and biases at random; what scales (norms, decays) stays near where it is."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise * 0.2)
        else:
            parameter.add_(noise * (0.2 if "bias" in name else 0.1))


def hybrid(
    model: PreTrainedModel, replaced: tuple[int, ...], init: Any = "mimic", ops: OpSet = TORCH, noise: bool = True
) -> PreTrainedModel:
    """The model with mixers in the given layers, moved away from their starts so that every parameter matters."""
    removed = replace_layers(model, LayerPlan(LAYERS, replaced), bias=has_bias(init), ops=ops)
    for index, attention in removed.items():
        mixer = mixers(model)[index]
        initialise(mixer, attention, init, torch.Generator().manual_seed(index))
        if noise:
            with torch.no_grad():
                generator = torch.Generator().manual_seed(10 + index)
                for parameter in mixer.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    mark(model, ops.backend, {"weights": "0" * 32, "config.json": "0" * 32})
    return model.requires_grad_(False)


def tokens(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    """Prompts of the given lengths, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 90, (n,), generator=generator) for n in lengths]


def image_prompt(family: str, text: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs of a prompt with one image before the text."""
    torch.manual_seed(3)
    if family in THREE_D:
        grid = torch.tensor([[1, 4, 4]])
        placeholders = torch.tensor([93, *[IMAGE_TOKEN] * 4, 92])
        ids = torch.cat([placeholders, text])[None]
        types = (ids == IMAGE_TOKEN).int()
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(16, 3 * 2 * 14 * 14),
            "image_grid_thw": grid,
            "mm_token_type_ids": types,
        }
    # Llava: 2 × 2 patches. Its successors, one view and the whole: those, and two rows of two with a new-line each.
    count = 4 if family == "llava" else 4 + 2 * 3
    ids = torch.cat([torch.full((count,), IMAGE_TOKEN), text])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 28, 28)}
    if family != "llava":
        inputs |= {"pixel_values": torch.randn(1, 2, 3, 28, 28), "image_sizes": torch.tensor([[28, 28]])}
    return inputs


def tinyllava(**settings: Any) -> LlavaConfig:
    """The configuration of TinyLLaVA-Phi-2-SigLIP-3.1B: Phi-2, and SigLIP so400m at 384 pixels."""
    text = PhiConfig(
        vocab_size=51200,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        partial_rotary_factor=0.4,
    )
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )
    return LlavaConfig(vision_config=vision, text_config=text, **settings)
