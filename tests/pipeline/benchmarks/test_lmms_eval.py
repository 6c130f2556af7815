"""Ours and lmms-eval's scorers give the same on the same answers; where their rules differ, how."""

import itertools

import pytest

from pipeline.benchmarks import mmbench, mmmu
from pipeline.benchmarks.open_answers import is_right
from pipeline.benchmarks.task import Item
from pipeline.benchmarks.vqa import normalise, soft_accuracy, tokenise
from tests.pipeline.benchmarks.conftest import Importer

SAID = [
    *[
        "",
        "yes",
        "Yes.",
        "two",
        "2",
        "T-shirt",
        "t shirt",
        "a woman's",
        "womans",
        "1,000",
        "1,000-2,000",
        "dont",
        "don't",
    ],
    *[
        "red,white",
        "red, white",
        "The White House",
        "3.5",
        "3.5.",
        "U.S.",
        "none",
        "left/right",
        "im",
        "Ive",
        "a\tb\nc",
    ],
]
ANNOTATED = [
    ["yes"] * 7 + ["Yes."] * 2 + ["no"],
    ["2"] * 2 + ["two"] * 2 + ["three"] * 6,
    ["T-shirt", "t shirt", "tshirt"] * 3 + ["shirt"],
    ["woman's", "a woman's", "womans"] * 3 + ["1,000"],
    ["1000", "red, white", "red,white", "red white", "dont", "don't", "3.5", "US", "0", "left right"],
    ["white house"] * 5 + ["The White House."] * 5,
]


def test_vqav2_scores_agree(theirs: Importer) -> None:
    process = theirs("tasks.vqav2.utils").vqav2_process_results
    for said, annotated in itertools.product(SAID, ANNOTATED):
        answers = [{"answer": text, "answer_id": n} for n, text in enumerate(annotated)]
        expected = process({"question_id": 1, "answers": answers}, [said])["exact_match"]
        assert soft_accuracy(normalise(said), [normalise(a) for a in annotated]) == pytest.approx(expected), said


def test_textvqa_scores_agree(theirs: Importer) -> None:
    process = theirs("tasks.textvqa.utils").textvqa_process_results
    for said, annotated in itertools.product(SAID, ANNOTATED):
        expected = process({"question_id": 1, "answers": list(annotated)}, [said])["exact_match"]
        assert soft_accuracy(tokenise(said), [tokenise(a) for a in annotated]) == pytest.approx(expected), said


def test_all_contractions_numbers_and_marks_agree(theirs: Importer) -> None:
    processor = theirs("tasks._task_utils.vqa_eval_metric").EvalAIAnswerProcessor()
    words = [*processor.CONTRACTIONS, *processor.NUMBER_MAP, *(f"a{mark}b {mark} c" for mark in processor.PUNCTUATIONS)]
    assert len(words) > 100
    for word in words:
        assert tokenise(word) == processor(word)


def test_mmmu_open_answers_agree(theirs: Importer) -> None:
    utils = theirs("tasks.mmmu.utils")
    said = [
        "",
        "8.4",
        "8.404",
        "It is 8.4 A.",
        "x = 5",
        "so 12\nthe answer is 5.",
        "1,000",
        "2e3",
        "s",
        "Trematodes",
        "-3",
    ]
    right = [["8.4"], ["5"], ["1000", "2000"], ["s"], ["trematode", "-3"], ["1,000"]]
    for answer, wanted in itertools.product(said, right):
        assert is_right(answer, wanted) == utils.eval_open(wanted, utils.parse_open_response(answer)), answer


def test_mmmu_letters_agree_but_for_letters_that_touch_others(theirs: Importer) -> None:
    parse = theirs("tasks.mmmu.utils").parse_multi_choice_response
    options = {"A": "the left ventricle", "B": "the right ventricle", "C": "the aorta"}
    for answer in (
        "B",
        "B.",
        "(B)",
        "Answer: B",
        "the answer is C",
        "(A) no, (C)",
        "I say that it is the right ventricle",
    ):
        assert mmmu.letter(answer, options) == parse(answer, list(options), options), answer
    # the benchmark's own rule needs a blank before a letter; lmms-eval takes one at a word's end as well
    assert (mmmu.letter("Answer:B", options), parse("Answer:B", list(options), options)) == (None, "B")


CIRCLE = {
    7: (["yes", "no"], "AB"),
    241: (["cat", "dog", "horse", "sea lion"], "BADC"),
}


def rotations() -> list[Item]:
    """As ``CIRCULAR`` reads them."""
    items = []
    for question, (options, right) in CIRCLE.items():
        for turn, letter in enumerate(right):
            named = dict(zip("ABCD", options[turn:] + options[:turn], strict=False))
            choice = mmbench.Choice(named, letter, question, len(options), {})
            items.append(Item(str(question + turn * mmbench.OFFSET), "", (), choice, "perception"))
    return items


@pytest.mark.parametrize(
    "answers",
    [
        ["A", "B", "B", "A", "D", "C"],
        ["A", "B", "B", "A", "D", "A"],
        ["A.", "(B)", "B. dog", "Answer: A", "sea lion is D", "C"],
        ["yes", "yes", "dog", "dog", "dog", "It is a dog."],
        ["", "", "B", "A", "D", "C"],
        ["no", "A", "cat", "B", "", "D"],
    ],
)
def test_mmbench_circular_accuracy_agrees_with_their_evaluation_without_judge(
    theirs: Importer, answers: list[str]
) -> None:
    items = rotations()
    rows = [
        {"index": int(i.id), "question": "", "answer": i.reference.right, "prediction": said, "category": "object"}
        | {name: i.reference.options.get(name) for name in "ABCD"}
        for i, said in zip(items, answers, strict=True)
    ]
    overall, *_ = theirs("tasks.mmbench.mmbench_evals").MMBench_Evaluator().eval_result(rows, eval_method="static")
    assert mmbench.CIRCULAR.score(items, answers)["accuracy"].estimate()["value"] == overall
