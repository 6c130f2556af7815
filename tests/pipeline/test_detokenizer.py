"""Text from tokens as they come: all of it is what decoding at once gives, nothing is taken back, nothing kept long."""

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from jobs.demo import teacher_model
from pipeline.detokenizer import Detokenizer
from tests.teachers import build_tokenizer

WORDS = ["▁", "▁a", "▁the", "b", "é", ".", "▁▁", "世"]


def sentencepiece() -> PreTrainedTokenizerFast:
    """Words with their blank in front, and a token for each byte of what is no word, as Llama's vocabulary."""
    known = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(known)}, [], unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


TOKENIZERS: dict[str, Any] = {
    "bytes": lambda: build_tokenizer(("<|im_start|>", "<|im_end|>"), begins=False),
    "sentencepiece": sentencepiece,
    "words": teacher_model.build_tokenizer,
}


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    said = Detokenizer(tokenizer)
    return [*(said.add(token) for token in ids), said.end()]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_together_are_the_text_of_any_tokens(kind: str) -> None:
    tokenizer, draw = TOKENIZERS[kind](), np.random.default_rng(0)
    some = [t for text in ("né 世 😀.", " \n", "a  b") for t in tokenizer(text, add_special_tokens=False)["input_ids"]]
    longest = 0
    for _ in range(300):
        # one half are any tokens, most of them broken characters and some special; the other parts of good text
        chosen = [int(draw.integers(len(tokenizer))) if draw.random() < 0.5 else some[draw.integers(len(some))]]
        ids = [*chosen, *(draw.choice([*some, *draw.integers(len(tokenizer), size=8)], draw.integers(0, 16)).tolist())]
        found = pieces(tokenizer, ids)
        assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=True).strip(), ids
        longest = max(longest, sum(bool(piece) for piece in found))
    assert longest > 3, "nothing came in several pieces"


def test_a_character_of_several_tokens_comes_whole() -> None:
    tokenizer = TOKENIZERS["bytes"]()
    ids = tokenizer("a😀é!")["input_ids"]
    assert pieces(tokenizer, ids) == ["a", "", "", "", "😀", "", "é", "!", ""]


def test_blanks_come_with_what_follows_and_never_last() -> None:
    tokenizer = TOKENIZERS["bytes"]()
    assert pieces(tokenizer, tokenizer(" \na \n b \n")["input_ids"]) == ["", "", "a", "", "", "", " \n b", "", "", ""]


def test_text_without_blanks_is_not_kept_back() -> None:
    tokenizer = TOKENIZERS["bytes"]()
    assert pieces(tokenizer, tokenizer("https://x")["input_ids"]) == [*"https://x", ""]


def test_blank_before_a_word_of_sentencepiece_stays_where_a_piece_begins() -> None:
    tokenizer = sentencepiece()
    ids = tokenizer.convert_tokens_to_ids(["▁the", "▁a", "b", "<0x0A>", "▁", "▁the", "."])
    assert pieces(tokenizer, ids) == ["the", " a", "b", "", "", "\n  the", ".", ""]


def test_bytes_of_sentencepiece_wait_for_their_neighbours() -> None:
    tokenizer = sentencepiece()
    good, bad = ["<0xC3>", "<0xA9>"], ["<0xC3>", "<0xA9>", "<0xFF>"]
    ids = tokenizer.convert_tokens_to_ids([*good, "b", *bad, "b"])
    # the wrong byte makes its whole run unreadable, the good character in it too
    assert pieces(tokenizer, ids) == ["", "", "éb", "", "", "", "\ufffd\ufffd\ufffdb", ""]


def test_what_was_never_completed_comes_at_the_end() -> None:
    tokenizer = TOKENIZERS["bytes"]()
    ids = tokenizer("a😀")["input_ids"][:-1]
    assert pieces(tokenizer, ids)[-1] == "\ufffd"
