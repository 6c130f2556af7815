"""MME as LLaVA lays it out: sums over subtasks, pairs of questions, and the files of MME's own calculation."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.benchmarks.mme import PERCEPTION, SUBTASKS, TASK, said
from schemas.errors import SampleInvalid
from tests.pipeline.benchmarks.layouts import figures, shuffled, write_lines, write_picture

SUFFIX = "\nAnswer the question using a single word or phrase."
# Subtasks whose pictures and answers lie in folders of their own, as in MME's archive.
APART = ("artwork", "celebrity", "landmark", "posters", "scene")


def place(folder: Path, subtask: str, name: str) -> tuple[str, Path]:
    """An image's path in the question file, and where its answers are."""
    root = folder / "MME_Benchmark_release_version" / subtask
    if subtask in APART:
        return f"{subtask}/images/{name}.jpg", root / "questions_answers_YN" / f"{name}.txt"
    return f"{subtask}/{name}.png", root / f"{name}.txt"


def write(folder: Path, seed: int | None = None, drop: str | None = None) -> list[dict[str, Any]]:
    """One image a subtask, two of existence; of each the question with "cat" is right and that with "dog" is wrong."""
    rows = []
    for subtask in SUBTASKS:
        for name in ("0001", "0002") if subtask == "existence" else ("0001",):
            image, answers = place(folder, subtask, name)
            write_picture(folder / "MME_Benchmark_release_version" / image)
            answers.parent.mkdir(parents=True, exist_ok=True)
            # one blank before the suffix in some of MME's files, two in others
            answers.write_text(
                "Is it a cat? Please answer yes or no.\tYes\nIs it a dog?  Please answer yes or no.\tNo\n"
            )
            rows += [
                {"question_id": image, "image": image, "text": f"Is it a {animal}?{SUFFIX}", "category": subtask}
                for animal in ("cat", "dog")
            ]
    rows = [row for row in rows if row["category"] != drop]
    write_lines(folder / "llava_mme.jsonl", rows if seed is None else shuffled(rows, seed))
    return rows


def replies(folder: Path) -> dict[str, str]:
    """Right, but: existence's second image and the calculation half, commonsense not at all."""
    given = {item.id: "Yes" if "cat" in item.prompt else "no." for item in TASK.read(folder)}
    given["existence/0002.png#2"] = "yes"
    given["numerical_calculation/0001.png#1"] = ""
    given["commonsense_reasoning/0001.png#1"] = "No"
    given["commonsense_reasoning/0001.png#2"] = "I cannot say"
    return given


def test_figures_are_those_computed_by_hand(tmp_path: Path) -> None:
    write(tmp_path)
    found = figures(TASK, TASK.read(tmp_path), replies(tmp_path))
    # existence: 3 of 4 questions and 1 of 2 images: 75 + 50; the nine others 100 + 100
    assert found["existence_accuracy"] == 0.75
    assert found["existence_accuracy_plus"] == 0.5
    assert found["existence"] == 125
    assert found["perception"] == 125 + 9 * 200
    # commonsense 0, calculation 1 of 2 questions and 0 of 1 images: 50 + 0, the two others 200
    assert found["commonsense_reasoning"] == 0
    assert found["numerical_calculation"] == 50
    assert found["cognition"] == 0 + 50 + 200 + 200


def test_figures_say_what_they_are_of(tmp_path: Path) -> None:
    write(tmp_path)
    items = TASK.read(tmp_path)
    scores = TASK.score(items, ["yes"] * len(items))
    assert list(scores)[:2] == ["perception", "cognition"]
    assert [scores[name].scale for name in ("perception", "cognition", "OCR", "OCR_accuracy")] == [2000, 800, 200, 1]
    # whoever says yes to all has every image half right, whichever images are drawn
    assert scores["perception"].estimate() == {"value": 500, "scale": 2000, "n": 11, "ci95": [500, 500]}
    assert len(scores) == 2 + 3 * len(SUBTASKS)


def test_interval_is_of_images_and_leaves_no_subtask_out(tmp_path: Path) -> None:
    write(tmp_path)
    items, given = TASK.read(tmp_path), replies(tmp_path)
    found = TASK.score(items, [given[item.id] for item in items])["perception"].estimate()
    # a draw may hold existence's images alone, in the extreme only the worse (50 points) or others (200 points)
    assert found["n"] == 11
    assert 500 <= found["ci95"][0] < found["value"] < found["ci95"][1] <= 2000


@pytest.mark.parametrize("seed", range(5))
def test_order_of_records_changes_no_figure(tmp_path: Path, seed: int) -> None:
    write(tmp_path)
    given = replies(tmp_path)
    before = figures(TASK, TASK.read(tmp_path), given)
    write(tmp_path, seed)
    assert figures(TASK, TASK.read(tmp_path), given) == before


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        ("yes.", "yes"),
        ("No, there is none", "no"),
        ("  NO", "no"),
        ("Yes and no", "yes"),
        ("No, yes", "no"),
        ("Not at all", "no"),
        ("Know", "no"),
        ("I know", "other"),
        ("Answer: yes", "other"),
        ("(yes)", "yes"),
        ("y", "other"),
        ("", "other"),
    ],
)
def test_first_four_letters_decide(answer: str, expected: str) -> None:
    assert said(answer) == expected


def test_questions_keep_their_suffix_and_get_no_other(tmp_path: Path) -> None:
    write(tmp_path)
    first = TASK.read(tmp_path)[0]
    assert first.prompt == f"Is it a cat?{SUFFIX}"
    assert first.images == (tmp_path / "MME_Benchmark_release_version/existence/0001.png",)


def test_files_are_those_of_the_official_calculation(tmp_path: Path) -> None:
    write(tmp_path, seed=0)
    items = TASK.read(tmp_path)
    made = TASK.files(items, ["Yes,\tI\nthink"] * len(items))
    assert set(made) == {f"{subtask}.txt" for subtask in SUBTASKS}
    for name, content in made.items():
        lines = content.decode().splitlines()
        assert len(lines) == (4 if name == "existence.txt" else 2)
        fields = [line.split("\t") for line in lines]
        assert all(len(four) == 4 and four[3] == "Yes, I think" for four in fields)
        # the calculation takes lines two by two as one image's
        assert all(a[0] == b[0] for a, b in zip(fields[::2], fields[1::2], strict=True))
    assert made["OCR.txt"].decode().splitlines() == [
        "0001.txt\tIs it a cat? Please answer yes or no.\tYes\tYes, I think",
        "0001.txt\tIs it a dog?  Please answer yes or no.\tNo\tYes, I think",
    ]


def test_half_asked_image_is_left_out(tmp_path: Path) -> None:
    write(tmp_path)
    given = {item.id: "yes" for item in TASK.read(tmp_path)}
    items = [item for item in TASK.read(tmp_path) if item.group in ("count", "OCR") and item.id != "count/0001.png#2"]
    found = figures(TASK, items, given)
    assert "count" not in found
    # one of ten subtasks is there, with 50 points; the others count as it does
    assert (found["OCR"], found["perception"]) == (50, 500)
    assert set(TASK.files(items, ["yes"] * len(items))) == {"OCR.txt"}


def test_missing_second_question_is_named(tmp_path: Path) -> None:
    rows = write(tmp_path)
    write_lines(tmp_path / "llava_mme.jsonl", rows[1:])
    with pytest.raises(SampleInvalid, match=r"existence/0001\.png: expected two different questions, got \['Is it a d"):
        TASK.read(tmp_path)


def test_doubled_question_is_named(tmp_path: Path) -> None:
    rows = write(tmp_path)
    write_lines(tmp_path / "llava_mme.jsonl", [rows[0], *rows])
    with pytest.raises(SampleInvalid, match=r"record 0: existence/0001\.png: expected two different questions"):
        TASK.read(tmp_path)


def test_unknown_subtask_is_named(tmp_path: Path) -> None:
    rows = write(tmp_path)
    write_lines(tmp_path / "llava_mme.jsonl", [{**row, "category": row["category"].lower()} for row in rows])
    with pytest.raises(SampleInvalid, match=r"`category`: expected one of existence, .* got ocr"):
        TASK.read(tmp_path)


@pytest.mark.parametrize("subtask", [PERCEPTION[0], "code_reasoning"])
def test_missing_subtask_is_named(tmp_path: Path, subtask: str) -> None:
    write(tmp_path, drop=subtask)
    with pytest.raises(SampleInvalid, match=f"no questions of {subtask}"):
        TASK.read(tmp_path)


def test_missing_picture_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "MME_Benchmark_release_version/scene/images/0001.jpg").unlink()
    with pytest.raises(SampleInvalid, match=r"scene/images/0001\.jpg: does not exist"):
        TASK.read(tmp_path)


def test_missing_answers_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    place(tmp_path, "scene", "0001")[1].unlink()
    with pytest.raises(SampleInvalid, match=r"questions_answers_YN/0001\.txt: cannot be read"):
        TASK.read(tmp_path)


@pytest.mark.parametrize(
    ("content", "fault"),
    [("Is it a cat?\tMaybe\n", "line 1: expected a question, a tab and Yes or No"), ("Is it a cow?\tYes\n", "no such")],
)
def test_answers_of_other_questions_are_refused(tmp_path: Path, content: str, fault: str) -> None:
    write(tmp_path)
    place(tmp_path, "count", "0001")[1].write_text(content)
    with pytest.raises(SampleInvalid, match=fault):
        TASK.read(tmp_path)
