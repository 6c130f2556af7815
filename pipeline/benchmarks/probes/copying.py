"""Copying a random text exactly, which a state of fixed size can do up to a length only (arXiv 2402.01032)."""

from os.path import commonprefix
from random import Random

from pipeline.benchmarks.probes.draft import Asked, Draft
from pipeline.benchmarks.probes.words import ADJECTIVES, NOUNS, VALUES

WORDS = (*ADJECTIVES, *NOUNS, *VALUES)
# Fewer are copied by any model.
FEWEST = 4


def draft(draw: Random, _number: int, length: int) -> Draft:
    """Words drawn with repetition, so that none can be told from those before it."""
    most = max(length, FEWEST)
    drawn = draw.choices(WORDS, k=most)

    def build(words: int) -> Asked:
        text = " ".join(drawn[:words])
        return Asked(f"Copy the last line of this message exactly, and write nothing else.\n\n{text}", text)

    return Draft(FEWEST, most, build)


def figures(expected: str, answer: str) -> dict[str, float]:
    """``exact_match``, and ``correct_prefix``: the share of characters before the first wrong or missing one."""
    right = len(commonprefix([expected, answer]))  # noqa: RUF071 - character by character is meant
    return {"exact_match": float(answer == expected), "correct_prefix": right / len(expected)}
