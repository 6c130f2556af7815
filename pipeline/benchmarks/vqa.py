"""VQA's answer normalisation and soft accuracy, of which the scores of TextVQA and VQAv2 are made.

Two normalisations are in use, and they are not the same: that of the VQA evaluation (``normalise``), and that of
TextVQA's evaluator (``tokenise``), which goes before it there and which LLaVA applies to its VQAv2 submissions.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.benchmarks.files import read_json
from schemas.errors import SampleInvalid

# What LLaVA puts after a question whose answer is short.
SHORT = "Answer the question using a single word or phrase."
# Annotators of a question, of whom three must agree for full marks.
ANNOTATORS, ENOUGH = 10, 3

MARKS = ';/[]"{}()=+\\_-><@`,?!'
THOUSANDS = re.compile(r"(?<=\d),+(?=\d)")
FULL_STOP = re.compile(r"\.(?!\d)")
ARTICLES = {"a", "an", "the"}
WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(WORDS.split())}
# Spelt in full; the evaluation knows each of them with any one apostrophe left out.
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in CONTRACTED.split() for at, mark in enumerate(word) if mark == "'"
} | {"somebody'd": "somebodyd"}  # the wrong way round in the official table, and so in every published score


def normalise(text: str) -> str:
    """An answer as the VQA evaluation compares it: no punctuation or articles, digits for numbers, contractions whole.

    Source: GT-Vision-Lab/VQA, ``vqaEval.py``. A mark becomes nothing beside a blank and a blank between letters. Where
    the answer has a number with thousands (``1,000``), every mark in it becomes nothing.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    found = text
    for mark in MARKS:
        alone = f"{mark} " in text or f" {mark}" in text or THOUSANDS.search(text)
        found = found.replace(mark, "" if alone else " ")
    words = (NUMBERS.get(word, word) for word in FULL_STOP.sub("", found).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def tokenise(text: str) -> str:
    """An answer as TextVQA's evaluator compares it: commas and question marks out, ``'s`` a word, then ``normalise``.

    Source: facebookresearch/mmf, ``EvalAIAnswerProcessor`` (LLaVA's ``m4c_evaluator.py``).
    """
    return normalise(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def soft_accuracy(answer: str, annotated: Sequence[str]) -> float:
    """min(1, matches / 3), averaged over all ways to leave one annotator out; all texts are normalised.

    With ten annotators, 0, 1, 2, 3 and more matches give 0, 0.3, 0.6, 0.9 and 1 (Antol et al. 2015, as evaluated).
    """
    matches, count = sum(answer == other for other in annotated), len(annotated)
    with_one_less = matches * min(1.0, (matches - 1) / ENOUGH)
    return (with_one_less + (count - matches) * min(1.0, matches / ENOUGH)) / count


def read_list(path: Path, name: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of the list that a JSON object holds under ``name``, and where each is.

    Raises:
        SampleInvalid: the file is missing or no JSON, or holds no such list, or one of something else.
    """
    whole = read_json(path)
    found = whole.get(name) if isinstance(whole, dict) else None
    if not isinstance(found, list) or not found:
        raise SampleInvalid(f"{path}: `{name}`: expected a list of records; this is not the published file")
    for number, row in enumerate(found):
        if not isinstance(row, dict):
            raise SampleInvalid(f"{path}: {name}: record {number}: expected an object, got {type(row).__name__}")
    return [(f"{path}: {name}: record {number}", row) for number, row in enumerate(found)]


def ten(answers: Sequence[Any], where: str) -> tuple[str, ...]:
    """The annotators' answers.

    Raises:
        SampleInvalid: they are not ten texts, without which the score has another meaning.
    """
    if len(answers) != ANNOTATORS or not all(isinstance(answer, str) for answer in answers):
        raise SampleInvalid(f"{where}: `answers`: expected {ANNOTATORS} texts, got {len(answers)} values")
    return tuple(answers)
