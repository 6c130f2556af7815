"""Probes' figures: what an answer is worth, by definitions and by hand, and how figures are put together."""

import functools
import random

import pytest

from pipeline.benchmarks.probes import copying, needle, reading, recall
from pipeline.benchmarks.probes.make import expected
from tests.pipeline.benchmarks.probes import NOWHERE, probe, values


def test_figures_of_the_needle_make_a_table_of_depth_and_length() -> None:
    task = probe("needle", (400, 1000), questions=10)
    late = [expected(item) if item.reference["depth"] >= 0.75 else "7654321" for item in task.read(NOWHERE)]
    found = values(task, late)
    assert list(found) == [
        "exact_match",
        *("exact_match@400", "exact_match@1000"),
        *(f"exact_match@{length}/{depth}%" for depth in (0, 25, 50, 75, 100) for length in (400, 1000)),
    ]
    assert found["exact_match"] == found["exact_match@400"] == found["exact_match@1000"] == pytest.approx(0.4)
    assert [found[f"exact_match@400/{depth}%"] for depth in (0, 25, 50, 75, 100)] == [0, 0, 0, 1, 1]


def test_the_headline_is_the_mean_over_lengths_however_many_questions_each_has() -> None:
    task = probe("copying", (50, 100), questions=4)
    items = [item for item in task.read(NOWHERE) if item.group == "50" or item.id.endswith("-0")]
    assert len(items) == 5
    answers = [expected(item) if item.group == "50" else "" for item in items]
    scores = task.score(items, answers)
    assert scores["exact_match"].estimate()["value"] == 0.5
    assert scores["exact_match@50"].estimate() == {"value": 1.0, "scale": 1.0, "n": 4, "ci95": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("answer", "per_key"),
    [
        ("lemon soup wire tea", 1.0),
        ("Lemon, soup, wire, tea.", 1.0),
        ("- quiet river: lemon\n- old fox: soup\n- red car: wire\n- shy king: tea", 1.0),
        ("lemon soup wire", 0.75),
        ("soup lemon wire tea", 0.5),
        ("soup wire tea lemon", 0.0),
        ("lemon lemon lemon lemon", 0.25),
        ("lemon soup wire tea rice", 1.0),
        ("", 0.0),
    ],
)
def test_recall_is_scored_by_key_in_order(answer: str, per_key: float) -> None:
    assert recall.figures("lemon soup wire tea", answer) == {"per_key": per_key, "exact_match": float(per_key == 1)}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("4829103", 1),
        ("The secret number is 4829103.", 1),
        ("4,829,103", 1),
        ("It is 1, or 4829103", 1),
        ("1234567 4829103", 0),
        ("48291034", 0),
        ("829103", 0),
        ("", 0),
    ],
)
def test_the_first_number_of_seven_digits_is_the_answer(answer: str, right: float) -> None:
    assert needle.needle_figures("4829103", answer) == {"exact_match": right}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("609-323-7777", 1),
        ("Call (609) 323-7777.", 1),
        ("6093237777", 1),
        ("1. 609.323.7777", 1),
        ("609-323-7778", 0),
        ("202-323-7777 or 609-323-7777", 0),
        ("609-323-777", 0),
        ("609-323-77770", 0),
        ("unknown", 0),
    ],
)
def test_the_first_phone_number_is_the_answer_however_it_is_grouped(answer: str, right: float) -> None:
    assert needle.phone_figures("609-323-7777", answer) == {"exact_match": right}


@pytest.mark.parametrize(
    ("answer", "exact", "prefix"),
    [
        ("red fox", 1, 1.0),
        ("red fix", 0, 5 / 7),
        ("red fox fox", 0, 1.0),
        ("red", 0, 3 / 7),
        ("Red fox", 0, 0.0),
        ("", 0, 0.0),
    ],
)
def test_copies_are_scored_whole_and_by_their_correct_prefix(answer: str, exact: float, prefix: float) -> None:
    assert copying.figures("red fox", answer) == {"exact_match": exact, "correct_prefix": pytest.approx(prefix)}


@pytest.mark.parametrize(
    ("answer", "exact", "rate"),
    [
        ("red fox", 1, 0.0),
        ("red\nfox", 1, 0.0),
        ("red fx", 0, 1 / 7),
        ("red  foxes", 0, 2 / 7),
        ("bed box", 0, 2 / 7),
        ("", 0, 1.0),
        ("the picture shows some words", 0, 1.0),
    ],
)
def test_readings_are_scored_by_edits_of_characters(answer: str, exact: float, rate: float) -> None:
    assert reading.figures("red fox", answer) == {"exact_match": exact, "character_error_rate": pytest.approx(rate)}


def test_edits_are_those_of_the_definition() -> None:
    @functools.cache
    def defined(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(defined(a[1:], b) + 1, defined(a, b[1:]) + 1, defined(a[1:], b[1:]) + (a[0] != b[0]))

    draw = random.Random(0)
    pairs = [("".join(draw.choices("abc", k=draw.randrange(9))), "".join(draw.choices("abc", k=7))) for _ in range(60)]
    assert [reading.edits(*pair) for pair in pairs] == [defined(*pair) for pair in pairs]
    assert reading.edits("kitten", "sitting") == 3
    assert reading.edits("", "") == 0
