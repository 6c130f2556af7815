"""Associative recall of several keys (MQAR): pairs of a name and a word, then the words of some names are asked for.

After multi-query associative recall (Zoology, arXiv 2312.04927), put in words so that pretrained models can be asked:
what a state of fixed size must hold grows with the number of pairs, while attention looks each of them up.
"""

import re
from random import Random

from pipeline.benchmarks.probes.draft import Asked, Draft
from pipeline.benchmarks.probes.words import ADJECTIVES, NOUNS, VALUES

# Keys asked for at once: enough that one lucky look-up does not make a whole answer, few enough to be written quickly.
KEYS = 4
FEWEST = 10
_VALUES = frozenset(VALUES)


def draft(draw: Random, _number: int, length: int) -> Draft:
    """Pairs with distinct two-word names; a value may belong to several names, so that it tells nothing of them."""
    # a pair takes more than one token, so `length` of them are more than can be needed
    most = min(len(ADJECTIVES) * len(NOUNS), max(length, FEWEST))
    names = [name(i) for i in draw.sample(range(len(ADJECTIVES) * len(NOUNS)), most)]
    values = draw.choices(VALUES, k=most)
    order = draw.getrandbits(64)
    asked = ", ".join(names[:KEYS])

    def build(pairs: int) -> Asked:
        lines = [f"{n}: {v}\n" for n, v in zip(names[:pairs], values[:pairs], strict=True)]
        Random(order).shuffle(lines)
        prompt = (
            f"Each name in this list has a word.\n\n{''.join(lines)}\n"
            f"Write the words of these {KEYS} names, in this order, separated by blanks and without the names: {asked}"
        )
        return Asked(prompt, " ".join(values[:KEYS]))

    return Draft(FEWEST, most, build)


def name(index: int) -> str:
    """One of the distinct two-word names."""
    return f"{ADJECTIVES[index // len(NOUNS)]} {NOUNS[index % len(NOUNS)]}"


def figures(expected: str, answer: str) -> dict[str, float]:
    """``per_key``: the share of keys with the right word in their place; ``exact_match``: all of them.

    What else an answer has, such as the names themselves, is passed over: no name has a value's word in it.
    """
    wanted = expected.split()
    found = [word for word in re.findall(r"[a-z]+", answer.lower()) if word in _VALUES]
    hits = [w == f for w, f in zip(wanted, found, strict=False)]
    return {"per_key": sum(hits) / len(wanted), "exact_match": float(sum(hits) == len(wanted))}
