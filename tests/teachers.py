"""Tiny random teachers of every family as folders, with tokenizer, chat template and processor files as on the hub.

Their templates do what those of the real models do: parts or plain text, a BOS or none, a system sentence that comes by
itself, content that is trimmed, thoughts that are taken out of all answers but the last.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    LlavaProcessor,
    MistralConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    SiglipVisionConfig,
)

from tests.decoders import randomise

LAYERS, HIDDEN = 4, 32
SIDE, PATCH = 28, 14

VICUNA = """{%- for m in messages %}{%- if m.role != 'system' %}{{ m.role | upper }}: {% endif %}
{%- for c in m.content | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}
{%- for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text + ' ' }}{% endfor %}
{%- endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"""
INST_PARTS = """{%- for m in messages %}{% if m.role == 'user' %}[INST] {% for c in m.content %}
{%- if c.type == 'image' %}{{ '<image>\n' }}{% else %}{{ c.text }}{% endif %}{% endfor %} [/INST]
{%- else %} {{ m.content[0].text }}{{ eos_token }}{% endif %}{% endfor %}"""
KIND = "<|im_start|>system\\nBe kind.<|im_end|>\\n"
CHATML_PARTS = """{%- for m in messages %}{% if loop.first and m.role != 'system' %}{{ 'KIND' }}
{%- endif %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}
{%- if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}
{%- endif %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""".replace("KIND", KIND)
ONEVISION = CHATML_PARTS.replace("<|vision_start|><|image_pad|><|vision_end|>", "{{ '<image>\\n' }}")
CHATML = """{%- for m in messages %}{% if loop.first and m.role != 'system' %}{{ 'KIND' }}
{%- endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""".replace("KIND", KIND)
THINKING = """{%- set last = namespace(user=0) %}{% for m in messages %}
{%- if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.index0 > last.user %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{{- m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
HEADERS = """{{- bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
{{- m.content | trim + '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
INST = """{{- bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}
{{- raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""
GEMMA = """{{- bos_token }}{% for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
{{- m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""


@dataclass(frozen=True)
class Family:
    """How to make one: its configuration for a tokenizer, its template, and its processor where it sees images."""

    config: Callable[[Any], Any]
    template: str | None
    specials: tuple[str, ...]
    processor: Callable[[Any], Any] | None = None
    begins: bool = False  # the tokenizer puts a BOS in front by itself


def build_tokenizer(specials: tuple[str, ...], *, begins: bool) -> PreTrainedTokenizerFast:
    """Every byte a token, as byte-level BPE without merges has them; ``<s>`` and ``</s>`` besides."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<pad>", "<s>", "</s>", *specials])
    if begins:
        core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>" if "<|im_end|>" not in specials else "<|im_end|>",
        pad_token="<pad>",
        extra_special_tokens=list(specials),
    )


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | more


CLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
}
PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def _image(tokenizer: Any) -> int:
    return int(tokenizer.convert_tokens_to_ids("<image>"))


def _llava(tokenizer: Any) -> LlavaConfig:
    vision, text = CLIPVisionConfig(**CLIP, patch_size=PATCH), LlamaConfig(**_text(tokenizer))
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=_image(tokenizer))


def _llava_phi(tokenizer: Any) -> LlavaConfig:
    vision = SiglipVisionConfig(**CLIP, patch_size=PATCH)
    text = PhiConfig(**_text(tokenizer, num_key_value_heads=4))
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=_image(tokenizer), vision_feature_select_strategy="full"
    )


def _llava_next(tokenizer: Any) -> LlavaNextConfig:
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**CLIP, patch_size=PATCH),
        text_config=MistralConfig(**_text(tokenizer), sliding_window=None),
        image_token_id=_image(tokenizer),
        image_grid_pinpoints=PINPOINTS,
    )


def _onevision(tokenizer: Any) -> LlavaOnevisionConfig:
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**CLIP, patch_size=PATCH, vision_use_head=False),
        text_config=Qwen2Config(**_text(tokenizer)),
        image_token_id=_image(tokenizer),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )


def _qwen_vl(kind: Any, **vision: Any) -> Callable[[Any], Any]:
    def config(tokenizer: Any) -> Any:
        ids = {
            f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
            for name, token in (
                ("image", "<|image_pad|>"),
                ("video", "<|video_pad|>"),
                ("vision_start", "<|vision_start|>"),
                ("vision_end", "<|vision_end|>"),
            )
        }
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        return kind(
            text_config=_text(tokenizer, rope_parameters=rope),
            vision_config={"depth": 2, "num_heads": 2, "patch_size": PATCH, **vision},
            **ids,
        )

    return config


def _llava_processor(additional: int, strategy: str) -> Callable[[Any], Any]:
    def processor(tokenizer: Any) -> LlavaProcessor:
        images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
        return LlavaProcessor(
            images,
            tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=additional,
            image_token="<image>",
        )

    return processor


def _next_processor(tokenizer: Any) -> LlavaNextProcessor:
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
    )
    return LlavaNextProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


VISION_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
FAMILIES: dict[str, Family] = {
    "llama": Family(
        lambda t: LlamaConfig(**_text(t)),
        HEADERS,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        begins=True,
    ),
    "qwen2": Family(lambda t: Qwen2Config(**_text(t)), CHATML, ("<|im_start|>", "<|im_end|>")),
    "qwen3": Family(lambda t: Qwen3Config(**_text(t), head_dim=8), THINKING, ("<|im_start|>", "<|im_end|>")),
    "mistral": Family(lambda t: MistralConfig(**_text(t), sliding_window=None), INST, (), begins=True),
    "phi": Family(lambda t: PhiConfig(**_text(t, num_key_value_heads=4)), None, ("<|endoftext|>",)),
    "gemma2": Family(
        lambda t: Gemma2Config(
            **_text(t), head_dim=8, query_pre_attn_scalar=8, layer_types=["full_attention"] * LAYERS
        ),
        GEMMA,
        ("<start_of_turn>", "<end_of_turn>"),
        begins=True,
    ),
    "llava-1.5": Family(_llava, VICUNA, ("<image>",), _llava_processor(1, "default"), begins=True),
    "llava-phi": Family(_llava_phi, None, ("<image>", "<|endoftext|>"), _llava_processor(0, "full")),
    "llava-next": Family(_llava_next, INST_PARTS, ("<image>",), _next_processor, begins=True),
    "llava-onevision": Family(_onevision, ONEVISION, ("<|im_start|>", "<|im_end|>", "<image>", "<video>")),
    "qwen2-vl": Family(
        _qwen_vl(Qwen2VLConfig, embed_dim=16, mlp_ratio=2, hidden_size=HIDDEN), CHATML_PARTS, VISION_TOKENS
    ),
    "qwen2.5-vl": Family(
        _qwen_vl(
            Qwen2_5_VLConfig, hidden_size=16, intermediate_size=32, out_hidden_size=HIDDEN, fullatt_block_indexes=[1]
        ),
        CHATML_PARTS,
        VISION_TOKENS,
    ),
}
# Families whose processors' classes cannot be made without torchvision; their files are written as they are on the hub.
WRITTEN = {
    "llava-onevision": (
        LlavaOnevisionImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS),
        {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": 4,
            "vision_feature_select_strategy": "full",
            "image_token": "<image>",
            "video_token": "<video>",
            "vision_aspect_ratio": "anyres_max_9",
        },
    ),
    "qwen2-vl": (
        Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=84 * 84),
        {"processor_class": "Qwen2VLProcessor"},
    ),
    "qwen2.5-vl": (
        Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=84 * 84),
        {"processor_class": "Qwen2_5_VLProcessor"},
    ),
}
WITH_IMAGES = [name for name, family in FAMILIES.items() if family.processor or name in WRITTEN]


def write_teacher(name: str, folder: Path, seed: int = 0) -> Path:
    """A teacher's folder with safetensors weights; returns it."""
    family = FAMILIES[name]
    tokenizer = build_tokenizer(family.specials, begins=family.begins)
    config = family.config(tokenizer)
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    torch.manual_seed(seed)
    model = kind.from_config(config)
    randomise(model, seed)
    model.save_pretrained(folder)
    if name in WRITTEN:
        images, said = WRITTEN[name]
        images.save_pretrained(folder)
        (folder / "processor_config.json").write_text(json.dumps(said))
        tokenizer.chat_template = family.template
    elif family.processor:
        processor = family.processor(tokenizer)
        processor.chat_template = family.template
        processor.save_pretrained(folder)
        return folder
    tokenizer.chat_template = family.template
    tokenizer.save_pretrained(folder)
    return folder
