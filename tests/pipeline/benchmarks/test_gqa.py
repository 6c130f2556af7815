"""GQA as LLaVA lays it out: exact match after the official clean-up, by image, and the predictions file."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.benchmarks.gqa import TASK, cleaned
from schemas.errors import SampleInvalid
from tests.pipeline.benchmarks.layouts import figures, shuffled, write_json, write_lines, write_picture

SUFFIX = "\nAnswer the question using a single word or phrase."
LABELS = "data/testdev_balanced_questions.json"
ASKED = [
    # id, image, structural type, answer
    ("201", "n1", "verify", "yes"),
    ("202", "n1", "query", "car"),
    ("203", "n1", "logical", "no"),
    ("204", "n2", "query", "two"),
    ("205", "n2", "choose", "left"),
]
REPLIES = {"201": "Yes.", "202": "the car", "203": "no", "204": "2", "205": "Left.."}


def write(folder: Path, seed: int | None = None, labels: str = LABELS) -> list[dict[str, Any]]:
    rows = []
    for number, image, _, _ in ASKED:
        write_picture(folder / "data/images" / f"{image}.jpg")
        rows.append(
            {
                "question_id": number,
                "image": f"{image}.jpg",
                "text": f"What is {number}?{SUFFIX}",
                "category": "default",
            }
        )
    known = [
        (number, {"imageId": image, "isBalanced": True, "types": {"structural": kind}, "answer": answer})
        for number, image, kind, answer in ASKED
    ]
    write_json(folder / labels, dict(known if seed is None else shuffled(known, seed + 1)))
    write_lines(folder / "llava_gqa_testdev_balanced.jsonl", rows if seed is None else shuffled(rows, seed))
    return rows


def test_figures_are_those_computed_by_hand(tmp_path: Path) -> None:
    write(tmp_path)
    found = figures(TASK, TASK.read(tmp_path), REPLIES)
    # right: yes, no and left, which are all binary; wrong: the article and the digit, which are all open
    assert list(found.items()) == [("accuracy", 3 / 5), ("binary", 3 / 3), ("open", 0 / 2)]


def test_interval_is_of_images(tmp_path: Path) -> None:
    write(tmp_path)
    items = TASK.read(tmp_path)
    found = TASK.score(items, [REPLIES[item.id] for item in items])["accuracy"].estimate()
    # n1 alone: 2 of 3; n2 alone: 1 of 2
    assert found["n"] == 2
    assert found["ci95"] == pytest.approx([1 / 2, 2 / 3])


@pytest.mark.parametrize("seed", range(5))
def test_order_of_records_changes_no_figure(tmp_path: Path, seed: int) -> None:
    write(tmp_path)
    before = figures(TASK, TASK.read(tmp_path), REPLIES)
    write(tmp_path, seed)
    assert figures(TASK, TASK.read(tmp_path), REPLIES) == before


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        ("Yes.", "yes"),
        ("yes..", "yes"),
        (" Traffic light. ", "traffic light"),
        ("the car", "the car"),
        ("two", "two"),
        ("2", "2"),
        ("yes!", "yes!"),
        ("(A)", "(a)"),
        ("Answer: A", "answer: a"),
        ("yes. no", "yes. no"),
        ("", ""),
    ],
)
def test_only_case_and_full_stops_at_the_end_are_cleaned(answer: str, expected: str) -> None:
    assert cleaned(answer) == expected


def test_predictions_are_what_the_official_script_takes(tmp_path: Path) -> None:
    write(tmp_path, seed=3)
    items = TASK.read(tmp_path)
    made = TASK.files(items, [REPLIES[item.id] for item in items])
    assert list(made) == ["testdev_balanced_predictions.json"]
    rows = json.loads(made["testdev_balanced_predictions.json"])
    assert sorted(rows, key=lambda row: row["questionId"]) == [
        {"questionId": "201", "prediction": "yes"},
        {"questionId": "202", "prediction": "the car"},
        {"questionId": "203", "prediction": "no"},
        {"questionId": "204", "prediction": "2"},
        {"questionId": "205", "prediction": "left"},
    ]


def test_questions_keep_their_suffix_and_get_no_other(tmp_path: Path) -> None:
    write(tmp_path)
    first = TASK.read(tmp_path)[0]
    assert first.prompt == f"What is 201?{SUFFIX}"
    assert first.images == (tmp_path / "data/images/n1.jpg",)


def test_questions_may_lie_in_the_folder_of_their_archive(tmp_path: Path) -> None:
    write(tmp_path, labels="data/questions1.2/testdev_balanced_questions.json")
    assert figures(TASK, TASK.read(tmp_path), REPLIES)["accuracy"] == 3 / 5


def test_groups_that_a_subset_lacks_have_no_figure(tmp_path: Path) -> None:
    write(tmp_path)
    assert figures(TASK, TASK.read(tmp_path)[:1], REPLIES) == {"accuracy": 1, "binary": 1}


def test_missing_ids_are_named(tmp_path: Path) -> None:
    rows = write(tmp_path)
    write_lines(tmp_path / "llava_gqa_testdev_balanced.jsonl", rows[2:])
    with pytest.raises(SampleInvalid, match=r"201, 202: in .*, but not asked \(2 questions\)"):
        TASK.read(tmp_path)


def test_unknown_id_is_named(tmp_path: Path) -> None:
    rows = write(tmp_path)
    write_lines(tmp_path / "llava_gqa_testdev_balanced.jsonl", [{**rows[0], "question_id": "7"}, *rows])
    with pytest.raises(SampleInvalid, match=r"record 0: .*testdev_balanced_questions\.json: has no field `7`"):
        TASK.read(tmp_path)


def test_doubled_id_is_named(tmp_path: Path) -> None:
    rows = write(tmp_path)
    write_lines(tmp_path / "llava_gqa_testdev_balanced.jsonl", [*rows, rows[3]])
    with pytest.raises(SampleInvalid, match="204: more than one question has this id"):
        TASK.read(tmp_path)


def test_missing_picture_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "data/images/n2.jpg").unlink()
    with pytest.raises(SampleInvalid, match=r"record 3: image .*n2\.jpg: does not exist"):
        TASK.read(tmp_path)


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ([], "expected an object of questions by their ids, got list"),
        ({"201": {"answer": "yes"}}, "question 201: has no field `types`"),
        ({"201": {"types": {"structural": "query"}}}, "question 201: has no field `answer`"),
    ],
)
def test_faulty_answers_of_gqa_are_named(tmp_path: Path, value: Any, fault: str) -> None:
    write(tmp_path)
    write_json(tmp_path / LABELS, value)
    with pytest.raises(SampleInvalid, match=fault):
        TASK.read(tmp_path)
