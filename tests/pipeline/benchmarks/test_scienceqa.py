"""ScienceQA as LLaVA lays it out: letters as the official script reads them, with and without images."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.benchmarks.scienceqa import TASK, letter
from schemas.errors import SampleInvalid
from tests.pipeline.benchmarks.layouts import figures, shuffled, write_json, write_lines, write_picture

SUFFIX = "Answer with the option's letter from the given choices directly."
ASKED = [
    # id, number of choices, index of the right one, with an image
    ("4", 2, 1, False),
    ("5", 3, 1, True),
    ("11", 4, 1, True),
    ("15", 2, 0, False),
    ("42", 5, 4, True),
]
REPLIES = {"4": "B", "5": "(B)", "11": "B. New Hampshire", "15": "yes", "42": "The answer is E."}


def write(folder: Path, seed: int | None = None) -> list[dict[str, Any]]:
    rows, problems = [], []
    for number, choices, right, seen in ASKED:
        listed = "\n".join(f"{letter}. choice" for letter in "ABCDE"[:choices])
        mark = {"image": f"{number}/image.png"} if seen else {}
        question = f"{'<image>' + chr(10) if seen else ''}Which is {number}?\n{listed}"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "ABCDE"[right]}]
        rows.append({"id": number, "conversations": turns} | mark)
        problems.append((number, {"choices": ["choice"] * choices, "answer": right, "split": "test"}))
        if seen:
            write_picture(folder / "images/test" / mark["image"])
    if seed is not None:
        rows, problems = shuffled(rows, seed), shuffled(problems, seed + 1)
    write_json(folder / "llava_test_CQM-A.json", rows)
    write_json(folder / "problems.json", dict(problems))
    write_json(folder / "pid_splits.json", {"train": ["1"], "test": [row["id"] for row in rows]})
    return rows


def test_figures_are_those_computed_by_hand(tmp_path: Path) -> None:
    write(tmp_path)
    found = figures(TASK, TASK.read(tmp_path), REPLIES)
    # with an image 11 and 42 are right and 5 is unreadable; without, 4 is right and 15 unreadable
    assert list(found.items()) == [("image_accuracy", 2 / 3), ("accuracy", 3 / 5)]


@pytest.mark.parametrize("seed", range(5))
def test_order_of_records_changes_no_figure(tmp_path: Path, seed: int) -> None:
    write(tmp_path)
    before = figures(TASK, TASK.read(tmp_path), REPLIES)
    write(tmp_path, seed)
    assert figures(TASK, TASK.read(tmp_path), REPLIES) == before


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "B"),
        (" B\n", "B"),
        ("B.", "B"),
        ("B. because of this", "B"),
        ("The answer is B.", "B"),
        ("It melts. The answer is B", "B"),
        ("The answer is B, as it melts", "B"),
        ("A. no. The answer is B.", "A"),
        # nothing that the official scripts read
        ("(A)", None),
        ("Answer: A", None),
        ("A) no", None),
        ("A.no", None),
        ("a", None),
        ("F", None),
        ("B or C", None),
        ("BC", None),
        ("The answer is Boston.", None),
        ("The answer is A. The answer is B.", None),
        ("the answer is B", None),
        ("New Hampshire", None),
        ("", None),
    ],
)
def test_letters_are_read_and_never_guessed(answer: str, expected: str | None) -> None:
    assert letter(answer) == expected


def test_letter_beyond_the_choices_is_wrong(tmp_path: Path) -> None:
    write(tmp_path)
    found = figures(TASK, TASK.read(tmp_path), dict.fromkeys(REPLIES, "E"))
    assert found == {"image_accuracy": 1 / 3, "accuracy": 1 / 5}


def test_unreadable_answers_are_wrong_every_time(tmp_path: Path) -> None:
    write(tmp_path)
    items = TASK.read(tmp_path)
    found = TASK.score(items, [""] * len(items))["accuracy"].estimate()
    assert found == {"value": 0, "scale": 1, "n": 5, "ci95": [0, 0]}


def test_suffix_is_added_once_and_image_marks_are_taken_off(tmp_path: Path) -> None:
    write(tmp_path)
    items = {item.id: item for item in TASK.read(tmp_path)}
    assert items["5"].prompt == f"Which is 5?\nA. choice\nB. choice\nC. choice\n{SUFFIX}"
    assert items["5"].images == (tmp_path / "images/test/5/image.png",)
    assert items["4"].prompt == f"Which is 4?\nA. choice\nB. choice\n{SUFFIX}"
    assert items["4"].images == ()


def test_subset_without_images_has_no_figure_of_them(tmp_path: Path) -> None:
    write(tmp_path)
    items = [item for item in TASK.read(tmp_path) if item.group == "text"]
    assert figures(TASK, items, REPLIES) == {"accuracy": 1 / 2}


def test_missing_ids_are_named(tmp_path: Path) -> None:
    rows = write(tmp_path)
    write_json(tmp_path / "llava_test_CQM-A.json", rows[1:])
    with pytest.raises(SampleInvalid, match=r"4: in the test split of .*, but not asked"):
        TASK.read(tmp_path)


def test_question_of_another_split_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    write_json(tmp_path / "pid_splits.json", {"train": ["4"], "test": ["5", "11", "15", "42"]})
    with pytest.raises(SampleInvalid, match="4: not in the test split of"):
        TASK.read(tmp_path)


def test_unknown_split_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    write_json(tmp_path / "pid_splits.json", {"minitest": ["4"]})
    with pytest.raises(SampleInvalid, match=r"pid_splits\.json: has no field `test`"):
        TASK.read(tmp_path)


def test_doubled_id_is_named(tmp_path: Path) -> None:
    rows = write(tmp_path)
    write_json(tmp_path / "llava_test_CQM-A.json", [*rows, rows[2]])
    with pytest.raises(SampleInvalid, match="11: more than one question has this id"):
        TASK.read(tmp_path)


def test_missing_picture_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "images/test/42/image.png").unlink()
    with pytest.raises(SampleInvalid, match=r"record 4: image .*42/image\.png: does not exist"):
        TASK.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("problems.json", {}, r"problems\.json: has no field `4`"),
        (
            "problems.json",
            {"4": {"choices": ["no"], "answer": 1}},
            "problem 4: `answer`: expected the index of one of 1",
        ),
        ("problems.json", {"4": {"answer": 1}}, "problem 4: has no field `choices`"),
        ("problems.json", [], r"problems\.json: expected an object, got list"),
        ("llava_test_CQM-A.json", [{"id": "4", "conversations": []}], "record 0: `conversations`: expected turns"),
        ("llava_test_CQM-A.json", [], "holds no records"),
    ],
)
def test_faulty_files_are_named(tmp_path: Path, name: str, value: Any, fault: str) -> None:
    write(tmp_path)
    write_json(tmp_path / name, value)
    with pytest.raises(SampleInvalid, match=fault):
        TASK.read(tmp_path)


def test_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    rows = write(tmp_path)
    write_lines(tmp_path / "llava_test_CQM-A.json", rows)
    with pytest.raises(SampleInvalid, match=r"llava_test_CQM-A\.json: is not JSON"):
        TASK.read(tmp_path)
