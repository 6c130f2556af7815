"""MMMU's rules for answers to open questions: what in an answer is taken, and when it is right.

Source: MMMU-Benchmark/MMMU, ``eval_utils.py`` (``parse_open_response``, ``eval_open``). The rules are kept with what is
odd in them, since published scores are made by them: sentences are never told apart, because the text is in lower case
by then, and a text is right that contains the expected one.
"""

import re
from collections.abc import Sequence

# What stands before a result; in the last line an equals sign does, too.
BEFORE = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
TRIVIAL = {":", ",", ".", "!", "?", ";", "'"}
NUMBERS = [
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
]


def is_right(answer: str, right: Sequence[str]) -> bool:
    """Whether a number of the answer is one of the right answers, to two decimals, or a part of it contains one."""
    wanted = [form for text in right for form in forms(text)]
    texts = [form for form in wanted if isinstance(form, str)]
    return any(
        any(text in found for text in texts) if isinstance(found, str) else found in wanted for found in taken(answer)
    )


def taken(answer: str) -> list[str | float]:
    """What in an answer is compared: the shortest ends of its lines after words such as ``is``, and all their numbers.

    Without such words it is the whole answer.
    """
    lines = answer.strip().strip(".").lower().split("\n")
    ends = [end for n, line in enumerate(lines) if (end := _end(line, last=n == len(lines) - 1))]
    ends = ends or ["\n".join(lines)]
    numbers = [number for end in ends for pattern in NUMBERS for number in pattern.findall(end)]
    return [form for text in [*ends, *numbers] for form in forms(text)]


def forms(text: str) -> list[str | float]:
    """A number rounded to two decimals, or the text in lower case; one letter only where a blank is beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _end(line: str, *, last: bool) -> str | None:
    """The shortest text after the last of each of those words, None if it is none or a punctuation mark."""
    words = (*BEFORE, "=") if last else BEFORE
    ends = [line.rsplit(word, 1)[1].strip() for word in words if word in line]
    # the official loop begins anew where the shortest so far is empty
    shortest = ""
    for end in ends:
        shortest = end if not shortest or len(end) < len(shortest) else shortest
    return shortest if shortest and shortest not in TRIVIAL else None
