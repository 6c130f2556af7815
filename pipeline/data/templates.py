"""TinyLLaVA's conversation templates as chat templates (Jinja), by the names that its training scripts give them.

They take messages ``{role: system|user|assistant, content: text}``. What they render is what the models were trained
on, to the character; a tokenizer's BOS is not part of it.
"""

from collections.abc import Mapping
from types import MappingProxyType

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# What ends an answer, which the model learns to predict.
ENDS: Mapping[str, str] = MappingProxyType(
    {
        "phi": "<|endoftext|>",
        "llama": "</s>",
        "qwen2_base": "<|endoftext|>",
        "qwen2_instruct": "<|im_end|>",
        "gemma": "<eos>",
    }
)
# The roles of a conversation; what else a template is given is an error, not an answer.
_OTHER_ROLE = "{%- else -%}{{ raise_exception('no role of this template: ' + message['role']) }}{%- endif -%}"
# Every mention of an image leaves the question and one goes in front, as the models have seen it in training.
_CHAT = (
    "{%- if messages[0]['role'] != 'system' -%}{{ SYSTEM + ' ' }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ message['content'] + ' ' }}"
    "{%- elif message['role'] == 'user' -%}"
    "{%- set text = message['content'] -%}"
    "{%- if '<image>' in text -%}"
    "{%- set text = ('<image>\\n' + text.replace('<image>', '').strip()).strip() -%}"
    "{%- endif -%}"
    "{{ 'USER: ' + text + ' ' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ 'ASSISTANT: ' + message['content'] + END }}"
    + _OTHER_ROLE
    + "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)
# The connector's pretraining: an image and its caption, whatever the question was.
_PRETRAIN = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '<image>' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ message['content'] + '\\n' }}" + _OTHER_ROLE + "{%- endfor -%}"
)


def _chat(end: str) -> str:
    return '{%- set SYSTEM = "' + SYSTEM + '" -%}{%- set END = "' + end + '" -%}' + _CHAT


TEMPLATES: Mapping[str, str] = MappingProxyType({name: _chat(e) for name, e in ENDS.items()} | {"pretrain": _PRETRAIN})
