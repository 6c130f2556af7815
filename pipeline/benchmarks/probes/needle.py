"""Finding one fact in a long text: a needle in a haystack, and a number in a phone book.

The needle is RULER's task of one needle (arXiv 2404.06654) with a haystack of sentences that do not repeat; the phone
book is that of Jelassi et al. (arXiv 2402.01032), where every other entry is as likely to be asked for.
"""

import re
from random import Random

from pipeline.benchmarks.probes.draft import Asked, Draft
from pipeline.benchmarks.probes.recall import name
from pipeline.benchmarks.probes.words import ADJECTIVES, FIRST_NAMES, LAST_NAMES, NOUNS

# The questions of a length take turns at these shares of the haystack before the needle.
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
FEWEST = 10
VERBS = (
    "passed",
    "followed",
    "watched",
    "met",
    "found",
    "forgot",
    "liked",
    "heard",
    "left",
    "missed",
    "saw",
    "thanked",
)
TIMES = ("today", "yesterday", "last week", "in spring", "at noon", "before dawn", "after lunch", "that night")
SEVEN_DIGITS = re.compile(r"(?<!\d)\d,?\d{3},?\d{3}(?!\d)")
TEN_DIGITS = re.compile(r"(?<!\d)\(?\d{3}\)?[-. ]{0,2}\d{3}[-. ]?\d{4}(?!\d)")


def needle(draw: Random, number: int, length: int) -> Draft:
    """Sentences about nothing, one of which tells the number that is asked for."""
    depth = DEPTHS[number % len(DEPTHS)]
    key = name(draw.randrange(len(ADJECTIVES) * len(NOUNS)))
    secret = str(draw.randrange(10**6, 10**7))
    # a sentence has eight words or nine, so these are more than can be needed
    most = max(length // 4, FEWEST)
    hay = [_sentence(draw) for _ in range(most)]

    def build(sentences: int) -> Asked:
        before = round(depth * sentences)
        text = [*hay[:before], f"The secret number of the {key} is {secret}.", *hay[before:sentences]]
        prompt = (
            f"Somewhere in this text stands a secret number.\n\n{' '.join(text)}\n\n"
            f"What is the secret number of the {key}? Answer with the number alone."
        )
        return Asked(prompt, secret, depth=depth)

    return Draft(FEWEST, most, build)


def phone_book(draw: Random, _number: int, length: int) -> Draft:
    """Entries with distinct names in no order, one of which is asked for, anywhere in the book alike."""
    most = min(len(FIRST_NAMES) * len(LAST_NAMES), max(length, FEWEST))
    people = [_person(i) for i in draw.sample(range(len(FIRST_NAMES) * len(LAST_NAMES)), most)]
    numbers = [f"{draw.randrange(200, 1000)}-{draw.randrange(200, 1000)}-{draw.randrange(10**4):04}" for _ in people]
    share = draw.random()

    def build(entries: int) -> Asked:
        # the first is asked for, and stands anywhere
        lines = [f"{p}: {n}\n" for p, n in zip(people[:entries], numbers[:entries], strict=True)]
        lines.insert(int(share * entries), lines.pop(0))
        prompt = (
            f"This is a phone book.\n\n{''.join(lines)}\n"
            f"What is the phone number of {people[0]}? Answer with the number alone."
        )
        return Asked(prompt, numbers[0])

    return Draft(FEWEST, most, build)


def needle_figures(expected: str, answer: str) -> dict[str, float]:
    """``exact_match``: whether the first number of seven digits in the answer is the one."""
    return {"exact_match": _first(SEVEN_DIGITS, expected, answer)}


def phone_figures(expected: str, answer: str) -> dict[str, float]:
    """``exact_match``: whether the first phone number in the answer is the one, however its digits are grouped."""
    return {"exact_match": _first(TEN_DIGITS, expected, answer)}


def _first(pattern: re.Pattern[str], expected: str, answer: str) -> float:
    found = pattern.search(answer)
    return float(found is not None and _digits(found[0]) == _digits(expected))


def _digits(text: str) -> str:
    return re.sub(r"\D", "", text)


def _sentence(draw: Random) -> str:
    first, second = (name(draw.randrange(len(ADJECTIVES) * len(NOUNS))) for _ in range(2))
    return f"The {first} {draw.choice(VERBS)} the {second} {draw.choice(TIMES)}."


def _person(index: int) -> str:
    return f"{FIRST_NAMES[index // len(LAST_NAMES)]} {LAST_NAMES[index % len(LAST_NAMES)]}"
