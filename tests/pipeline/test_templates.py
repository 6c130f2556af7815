"""The conversation templates against a restatement of TinyLLaVA's rules."""

import random

import jinja2
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pipeline.data.templates import TEMPLATES

SENTENCE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
END = {
    "phi": "<|endoftext|>",
    "llama": "</s>",
    "qwen2_base": "<|endoftext|>",
    "qwen2_instruct": "<|im_end|>",
    "gemma": "<eos>",
}
PIECES = [
    "<image>",
    "\n",
    " ",
    "  ",
    "what",
    "ASSISTANT: ",
    " ASSISTANT: ",
    "USER:",
    "</s>",
    "{{content}}",
    "'",
    '"',
    "ü😀",
]


def restated(name: str, questions: list[str], answers: list[str | None]) -> str:
    """The original's rule; an answer that is None is what is asked for."""
    text = "" if name == "pretrain" else SENTENCE + " "
    for question, answer in zip(questions, answers, strict=True):
        if name == "pretrain":
            text += "<image>" + ("" if answer is None else answer + "\n")
            continue
        if "<image>" in question:
            question = ("<image>\n" + question.replace("<image>", "").strip()).strip()
        text += "USER: " + question + " "
        text += "ASSISTANT:" if answer is None else "ASSISTANT: " + answer + END[name]
    return text


def rendered(name: str, questions: list[str], answers: list[str | None]) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    turns = [
        {"role": role, "content": text}
        for pair in zip(questions, answers, strict=True)
        for role, text in zip(("user", "assistant"), pair, strict=True)
        if text is not None
    ]
    prompt = answers[-1] is None
    found = tokenizer.apply_chat_template(
        turns, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=prompt
    )
    assert isinstance(found, str)
    return found


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_random_conversations_render_as_the_original_renders_them(name: str) -> None:
    generator = random.Random(name)

    def text() -> str:
        return "".join(generator.choices(PIECES, k=generator.randrange(6)))

    for _ in range(200):
        questions = [text() for _ in range(generator.randrange(1, 4))]
        answers: list[str | None] = [text() for _ in questions]
        if generator.random() < 0.5:
            answers[-1] = None
        assert rendered(name, questions, answers) == restated(name, questions, answers)


def test_phi_renders_the_published_example() -> None:
    assert rendered("phi", ["<image>\nWhat are these?", "Why?"], ["Cats.", None]) == (
        SENTENCE + " USER: <image>\nWhat are these? ASSISTANT: Cats.<|endoftext|>USER: Why? ASSISTANT:"
    )
    assert rendered("phi", ["<image>"], [None]) == SENTENCE + " USER: <image> ASSISTANT:"


def test_a_system_message_takes_the_sentences_place() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert (
        tokenizer.apply_chat_template(
            turns, chat_template=TEMPLATES["llama"], tokenize=False, add_generation_prompt=True
        )
        == "Be brief. USER: Why? ASSISTANT:"
    )


def test_a_role_that_the_template_has_not_is_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(jinja2.TemplateError, match="no role of this template: tool"):
        tokenizer.apply_chat_template(
            [{"role": "tool", "content": "x"}], chat_template=TEMPLATES["phi"], tokenize=False
        )
