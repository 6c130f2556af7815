"""What VQA's normalisation makes of answers, and what agreement with ten annotators is worth."""

import pytest

from pipeline.benchmarks.vqa import normalise, soft_accuracy, tokenise


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The dog", "dog"),
        ("a cat and an owl", "cat and owl"),
        ("the", ""),
        ("", ""),
        ("Two", "2"),
        ("none", "0"),
        ("twenty one", "twenty 1"),
        ("yes.", "yes"),
        ("U.S.", "us"),
        ("3.5", "3.5"),
        ("3.5.", "3.5"),
        ("yes!", "yes"),
        ("red, white", "red white"),
        ("red,white", "red white"),
        ("left/right", "left right"),
        ("left / right", "left right"),
        ("t-shirt", "t shirt"),
        ("1,000", "1000"),
        # the thousands' comma takes the blank from every other mark in the answer
        ("1,000-2,000", "10002000"),
        ("10-20", "10 20"),
        ("(A)", ""),
        ("dont", "don't"),
        ("it couldnt've", "it couldn't've"),
        ("couldntve", "couldntve"),
        ("somebody'd", "somebodyd"),
        ("im", "im"),
        ("  New\nYork\tCity ", "new york city"),
        ("$5:30", "$5:30"),
    ],
)
def test_vqa_normalisation(answer: str, normal: str) -> None:
    assert normalise(answer) == normal


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Yes, sir?", "yes sir"),
        ("woman's", "woman 's"),
        ("red,white", "redwhite"),
        ("1,000", "1000"),
        ("1,000-2,000", "1000 2000"),
        ("The Two.", "2"),
    ],
)
def test_textvqa_normalisation_takes_commas_and_possessives_first(answer: str, normal: str) -> None:
    assert tokenise(answer) == normal


@pytest.mark.parametrize(
    ("matches", "worth"),
    [
        (0, 0.0),
        (1, 0.3),  # one leaves the one match out: 0; nine have it: 1/3; 9 · 1/3 / 10
        (2, 0.6),  # two · 1/3 + eight · 2/3 = 6; / 10
        (3, 0.9),  # three · 2/3 + seven · 1 = 9; / 10
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_worth_of_an_answer_by_the_annotators_who_gave_it(matches: int, worth: float) -> None:
    assert soft_accuracy("2", ["2"] * matches + ["3"] * (10 - matches)) == pytest.approx(worth)
