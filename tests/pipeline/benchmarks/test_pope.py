"""POPE as LLaVA lays it out: the official reading of yes and no, figures by split, labels by id."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.benchmarks.files import read_answers
from pipeline.benchmarks.pope import SPLITS, TASK, says_yes
from schemas.errors import SampleInvalid
from tests.pipeline.benchmarks.layouts import figures, shuffled, write_lines, write_picture

SUFFIX = "\nAnswer the question using a single word or phrase."
# As LLaVA numbers them.
OFFSETS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
# What is asked of which image in each split, and whether it is there.
ASKED = [("a.jpg", "dog", "yes"), ("a.jpg", "cat", "no"), ("b.jpg", "cup", "yes"), ("b.jpg", "umbrella", "no")]


def write(folder: Path, seed: int | None = None) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Four questions a split; POPE's wording has its own "an imange"."""
    questions, labels = [], {}
    for split, offset in OFFSETS.items():
        labels[split] = [
            {"question_id": number, "image": image, "text": wording(thing), "label": label}
            for number, (image, thing, label) in enumerate(ASKED, start=1)
        ]
        for row in labels[split]:
            write_picture(folder / "val2014" / str(row["image"]))
            questions.append(
                {
                    "question_id": offset + int(row["question_id"]),
                    "image": row["image"],
                    "text": f"{row['text']}{SUFFIX}",
                    "category": split,
                }
            )
        rows = labels[split] if seed is None else shuffled(labels[split], seed + 1)
        write_lines(folder / "coco" / f"coco_pope_{split}.json", rows)
    write_lines(folder / "llava_pope_test.jsonl", questions if seed is None else shuffled(questions, seed))
    return questions, labels


def wording(thing: str) -> str:
    return f"Is there an {thing} in the imange?" if thing[0] in "aeiou" else f"Is there a {thing} in the image?"


# adversarial: yes to all; popular: no to all but the dog; random: right, in a sentence, but for the umbrella
REPLIES = {
    **dict.fromkeys(["1", "2", "3", "4"], "Yes"),
    **{"20000001": "Yes", "20000002": "No", "20000003": "no", "20000004": "There is not."},
    **{"10000001": "Yes, a dog.", "10000002": "No, there is not a cat.", "10000003": "yes", "10000004": ""},
}
BY_HAND = {
    # 2 found, 2 false alarms: accuracy 2/4, precision 2/4, recall 2/2, F1 2*2/(2*2 + 2) = 2/3, yes 4/4
    "adversarial": (1 / 2, 1 / 2, 1.0, 2 / 3, 1.0),
    # 1 found, 1 missed, 2 rightly denied: accuracy 3/4, precision 1/1, recall 1/2, F1 2/(2 + 1), yes 1/4
    "popular": (3 / 4, 1.0, 1 / 2, 2 / 3, 1 / 4),
    # 2 found, 1 denied, 1 false alarm: accuracy 3/4, precision 2/3, recall 1, F1 4/(4 + 1), yes 3/4
    "random": (3 / 4, 2 / 3, 1.0, 4 / 5, 3 / 4),
}


def test_figures_are_those_computed_by_hand(tmp_path: Path) -> None:
    write(tmp_path)
    found = figures(TASK, TASK.read(tmp_path), REPLIES)
    assert next(iter(found)) == "f1"
    assert found["f1"] == pytest.approx((2 / 3 + 2 / 3 + 4 / 5) / 3)
    for split, expected in BY_HAND.items():
        names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
        assert [found[f"{split}_{name}"] for name in names] == pytest.approx(expected)
    assert len(found) == 1 + 5 * len(SPLITS)


def test_unit_is_an_image_with_its_questions_of_all_splits(tmp_path: Path) -> None:
    write(tmp_path)
    items = TASK.read(tmp_path)
    found = TASK.score(items, [REPLIES[item.id] for item in items])["f1"].estimate()
    # b.jpg alone: adversarial 2/(2 + 1), popular 0, random 2/(2 + 1); a.jpg alone: 2/3, 1 and 1
    assert found["n"] == 2
    assert found["ci95"] == pytest.approx([4 / 9, 8 / 9])


@pytest.mark.parametrize("seed", range(5))
def test_order_of_records_changes_no_figure(tmp_path: Path, seed: int) -> None:
    write(tmp_path)
    before = figures(TASK, TASK.read(tmp_path), REPLIES)
    write(tmp_path, seed)
    assert figures(TASK, TASK.read(tmp_path), REPLIES) == pytest.approx(before)


def test_who_never_says_yes_has_no_f1(tmp_path: Path) -> None:
    write(tmp_path)
    found = figures(TASK, TASK.read(tmp_path), dict.fromkeys(REPLIES, "no"))
    assert (found["f1"], found["random_precision"], found["random_accuracy"]) == (0, 0, 0.5)


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", True),
        ("yes.", True),
        ("No", False),
        ("no, there is none", False),
        ("There is not a dog", False),
        # both words: no wins wherever it stands in the first sentence
        ("Yes, there is no doubt", False),
        ("Yes. There is no doubt", True),
        ("No. Yes", False),
        ("No,yes", True),
        # what the official script does not take for a no
        ("NO", True),
        ("nothing", True),
        ("No!", True),
        ("Answer: No", False),
        ("(no)", True),
        ("", True),
    ],
)
def test_answers_are_read_as_by_the_official_script(answer: str, yes: bool) -> None:
    assert says_yes(answer) is yes


def test_questions_keep_their_suffix_and_get_no_other(tmp_path: Path) -> None:
    write(tmp_path)
    item = next(item for item in TASK.read(tmp_path) if item.id == "10000004")
    assert item.prompt == f"Is there an umbrella in the imange?{SUFFIX}"
    assert (item.images, item.reference, item.group) == ((tmp_path / "val2014/b.jpg",), False, "random")


def test_unknown_split_is_named(tmp_path: Path) -> None:
    questions, _ = write(tmp_path)
    write_lines(tmp_path / "llava_pope_test.jsonl", [*questions[:-1], {**questions[-1], "category": "easy"}])
    with pytest.raises(SampleInvalid, match=r"record 11: `category`: expected one of adversarial, .*, got easy"):
        TASK.read(tmp_path)


def test_missing_split_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "coco/coco_pope_popular.json").unlink()
    with pytest.raises(SampleInvalid, match=r"coco_pope_popular\.json: cannot be read"):
        TASK.read(tmp_path)


def test_question_without_label_is_named(tmp_path: Path) -> None:
    _, labels = write(tmp_path)
    write_lines(tmp_path / "coco/coco_pope_popular.json", labels["popular"][:-1])
    with pytest.raises(SampleInvalid, match="question 20000004: the popular split has no label 4"):
        TASK.read(tmp_path)


def test_label_without_question_is_named(tmp_path: Path) -> None:
    questions, _ = write(tmp_path)
    write_lines(tmp_path / "llava_pope_test.jsonl", questions[:-2])
    with pytest.raises(SampleInvalid, match="popular: no questions for the labels 3, 4 of"):
        TASK.read(tmp_path)


def test_labels_of_another_version_are_refused(tmp_path: Path) -> None:
    _, labels = write(tmp_path)
    rows = labels["random"]
    write_lines(
        tmp_path / "coco/coco_pope_random.json", [{**r, "question_id": 5 - int(r["question_id"])} for r in rows]
    )
    with pytest.raises(SampleInvalid, match=r"the random label 1 is of b\.jpg, .*umbrella.*: take the labels from"):
        TASK.read(tmp_path)


def test_label_of_another_image_is_refused(tmp_path: Path) -> None:
    _, labels = write(tmp_path)
    write_lines(tmp_path / "coco/coco_pope_random.json", [{**row, "image": "a.jpg"} for row in labels["random"]])
    with pytest.raises(SampleInvalid, match=r"question 10000003: the random label 3 is of a\.jpg"):
        TASK.read(tmp_path)


def test_labels_with_the_wording_mended_are_taken(tmp_path: Path) -> None:
    _, labels = write(tmp_path)
    mended = [{**row, "text": row["text"].replace("imange", "image")} for row in labels["random"]]
    write_lines(tmp_path / "coco/coco_pope_random.json", mended)
    assert figures(TASK, TASK.read(tmp_path), REPLIES)["random_f1"] == pytest.approx(4 / 5)


@pytest.mark.parametrize(
    ("fault", "message"),
    [({"label": "maybe"}, "expected yes or no, got maybe"), ({"question_id": 1}, "1 has a label already")],
)
def test_faulty_labels_are_named(tmp_path: Path, fault: dict[str, Any], message: str) -> None:
    _, labels = write(tmp_path)
    write_lines(tmp_path / "coco/coco_pope_random.json", [*labels["random"][:-1], {**labels["random"][-1], **fault}])
    with pytest.raises(SampleInvalid, match=f"record 3: .*{message}"):
        TASK.read(tmp_path)


def test_doubled_question_is_named(tmp_path: Path) -> None:
    questions, _ = write(tmp_path)
    write_lines(tmp_path / "llava_pope_test.jsonl", [*questions, questions[0]])
    with pytest.raises(SampleInvalid, match=r"llava_pope_test\.jsonl: 1: more than one question has this id"):
        TASK.read(tmp_path)


def test_missing_picture_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "val2014/b.jpg").unlink()
    with pytest.raises(SampleInvalid, match=r"record 2: image .*b\.jpg: does not exist"):
        TASK.read(tmp_path)


def test_answers_are_found_by_id_and_empty_ones_count(tmp_path: Path) -> None:
    write(tmp_path)
    items = TASK.read(tmp_path)
    rows = [{"question_id": int(i), "text": text} for i, text in REPLIES.items()]
    path = write_lines(tmp_path / "answers.jsonl", shuffled(rows, 0))
    assert read_answers(path, items) == [REPLIES[item.id] for item in items]


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([{"question_id": int(i), "text": "no"} for i in REPLIES if i != "3"], "3: no answer"),
        ([{"question_id": int(i), "text": "no"} for i in [*REPLIES, "3"]], "3: more than one answer"),
        ([{"question_id": int(i), "text": "no"} for i in [*REPLIES, "9"]], "9: no such question"),
        ([{"question_id": int(i)} for i in REPLIES], "record 0: has no field `text`"),
        ([{"question_id": int(i), "text": None} for i in REPLIES], "record 0: has no field `text`"),
        ([], "holds no records"),
    ],
)
def test_faulty_answers_are_named(tmp_path: Path, rows: list[dict[str, Any]], fault: str) -> None:
    write(tmp_path)
    path = write_lines(tmp_path / "answers.jsonl", rows)
    with pytest.raises(SampleInvalid, match=fault):
        read_answers(path, TASK.read(tmp_path))
