"""The demo teacher's parts: word-level tokenizer, processor files and the configuration of a small Llava model.

Owns the vocabulary and every size of the teacher; the weights come from ``train_teacher``.
"""

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PhiConfig,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from jobs.demo.scenes import CANVAS, COLOURS, MAX_SUM_DIGITS

PATCH = 8
IMAGE_TOKENS = (CANVAS // PATCH) ** 2
EOS = "<|endoftext|>"
IMAGE = "<image>"
SPECIAL = ["<pad>", EOS, "<unk>", IMAGE]
QUESTION_WORDS = (
    "a above add are colour digit digits do first from how in is largest left many next of often read right "
    "smallest sum the there to up user assistant what which written ? :"
)
# USER/ASSISTANT turns closed by the end token, as Phi-2's template in the field.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {{ message['content'] }}"
    "{% else %} ASSISTANT: {{ message['content'] }}" + EOS + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the demo's closed vocabulary: lower case, numbers up to the largest sum are words."""
    numbers = [str(n) for n in range(9 * MAX_SUM_DIGITS + 1)]
    words = SPECIAL + QUESTION_WORDS.split() + list(COLOURS) + numbers
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token=EOS,
        unk_token="<unk>",
        additional_special_tokens=[IMAGE],
        model_max_length=256,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_processor() -> LlavaProcessor:
    """Tokenizer and image processor of the teacher: 64 × 64 RGB to [-1, 1], one token a patch."""
    image_processor = SiglipImageProcessorPil(
        size={"height": CANVAS, "width": CANVAS}, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=0,
    )


def build_model(vocabulary: int) -> LlavaForConditionalGeneration:
    """The teacher with random weights: SigLIP-style tower (6 layers), MLP connector, Phi decoder (8 layers)."""
    text = PhiConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=256,
        resid_pdrop=0.0,
        partial_rotary_factor=0.5,
        bos_token_id=SPECIAL.index(EOS),
        eos_token_id=SPECIAL.index(EOS),
        pad_token_id=SPECIAL.index("<pad>"),
        tie_word_embeddings=False,
    )
    vision = SiglipVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=CANVAS,
        patch_size=PATCH,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL.index(IMAGE),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = SPECIAL.index(EOS)
    model.generation_config.pad_token_id = SPECIAL.index("<pad>")
    return model
