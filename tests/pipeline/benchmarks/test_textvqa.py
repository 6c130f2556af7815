"""TextVQA in LLaVA's layout: three questions of two images, scored by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.benchmarks.files import read_answers
from pipeline.benchmarks.textvqa import ANNOTATIONS, PROMPTS, TASK, question
from schemas.errors import SampleInvalid

SUFFIX = "\nAnswer the question using a single word or phrase."
TEXTS = {
    34602: ("What is the brand of this camera?", ["dakota"] * 4 + ["dakota digital"] * 3 + ["Dakota."] * 2 + ["kodak"]),
    34603: ("How many buttons?", ["2"] * 2 + ["two"] + ["three"] * 7),
    34604: ("What is the brand of this camera?", ["the nous les gosses"] + ["intel"] * 9),
}
IMAGES = {34602: "003a8ae2ef43b901", 34603: "003a8ae2ef43b901", 34604: "4be9a3d0ad6bd90f"}


def prompts() -> list[dict[str, Any]]:
    return [
        {
            "question_id": IMAGES[number],
            "image": f"{IMAGES[number]}.jpg",
            "text": f"{text}\nReference OCR token: DAKOTA, 2{SUFFIX}",
            "category": "default",
        }
        for number, (text, _) in TEXTS.items()
    ]


def annotations() -> list[dict[str, Any]]:
    return [
        {"question_id": number, "image_id": IMAGES[number], "question": text, "answers": answers, "set_name": "val"}
        for number, (text, answers) in TEXTS.items()
    ]


def published(folder: Path, asked: list[dict[str, Any]], annotated: list[dict[str, Any]]) -> Path:
    (folder / "train_images").mkdir()
    for name in set(IMAGES.values()):
        (folder / "train_images" / f"{name}.jpg").write_bytes(b"picture")
    (folder / PROMPTS).write_text("\n".join(json.dumps(row) for row in asked))
    (folder / ANNOTATIONS).write_text(json.dumps({"dataset_type": "val", "data": annotated}))
    return folder


def test_questions_are_llavas_prompts_named_by_the_annotations_ids(tmp_path: Path) -> None:
    items = TASK.read(published(tmp_path, prompts(), annotations()))
    assert [item.id for item in items] == ["34602", "34603", "34604"]
    assert items[1].prompt == f"How many buttons?\nReference OCR token: DAKOTA, 2{SUFFIX}"
    assert items[0].images == (tmp_path / "train_images" / "003a8ae2ef43b901.jpg",)


def test_score_is_the_mean_soft_accuracy(tmp_path: Path) -> None:
    items = TASK.read(published(tmp_path, prompts(), annotations()))
    # six annotators wrote dakota: 1; three wrote 2 or two: 0.9; one wrote nous les gosses: 0.3; 2.2 / 3
    estimate = TASK.score(items, ["Dakota", "Two.", "Nous les gosses"])["accuracy"].estimate()
    assert estimate["value"] == pytest.approx(2.2 / 3)
    assert estimate["n"] == 3
    assert TASK.score(items, ["", "", ""])["accuracy"].estimate()["value"] == 0


def test_line_separators_in_ocr_words_do_not_cut_a_record(tmp_path: Path) -> None:
    folder = published(tmp_path, prompts(), annotations())
    rows = [row | {"text": row["text"].replace("DAKOTA", "DA\u2028KOTA")} for row in prompts()]
    (folder / PROMPTS).write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    assert "DA\u2028KOTA" in TASK.read(folder)[2].prompt


@pytest.mark.parametrize(
    "prompt",
    [
        f"What Year?\nReference OCR token: {SUFFIX}",
        f"Reference OCR token: 1998\nWhat Year?{SUFFIX}",
        f"What Year?{SUFFIX}",
    ],
)
def test_question_is_found_in_every_form_of_llavas_prompts(prompt: str) -> None:
    assert question(prompt, "file") == "what year?"


def test_prompt_of_another_form_is_refused() -> None:
    with pytest.raises(SampleInvalid, match=r"file: record 1: `text`: expected lines of question"):
        question("What year?", "file: record 1")


def test_question_without_annotation_is_named(tmp_path: Path) -> None:
    folder = published(tmp_path, prompts(), annotations()[:2])
    with pytest.raises(SampleInvalid, match=r"record 2: what is the brand .* 4be9a3d0ad6bd90f has no .* annotation"):
        TASK.read(folder)


def test_question_asked_twice_is_refused(tmp_path: Path) -> None:
    folder = published(tmp_path, [*prompts(), prompts()[0]], annotations())
    with pytest.raises(SampleInvalid, match=r"record 3: .*\(further\) annotation"):
        TASK.read(folder)


def test_doubled_annotation_ids_are_refused(tmp_path: Path) -> None:
    doubled = annotations()
    doubled[1]["question_id"] = 34602
    with pytest.raises(SampleInvalid, match=r"34602: more than one question has this id"):
        TASK.read(published(tmp_path, prompts(), doubled))


def test_nine_annotators_are_refused(tmp_path: Path) -> None:
    short = annotations()
    short[0]["answers"] = ["dakota"] * 9
    with pytest.raises(SampleInvalid, match=r"data: record 0: `answers`: expected 10 texts, got 9"):
        TASK.read(published(tmp_path, prompts(), short))


def test_missing_picture_and_missing_list_are_named(tmp_path: Path) -> None:
    folder = published(tmp_path, prompts(), annotations())
    (folder / "train_images" / "4be9a3d0ad6bd90f.jpg").unlink()
    with pytest.raises(SampleInvalid, match=r"record 2: image .*4be9a3d0ad6bd90f\.jpg: does not exist"):
        TASK.read(folder)
    (folder / ANNOTATIONS).write_text("[]")
    with pytest.raises(SampleInvalid, match="`data`: expected a list of records"):
        TASK.read(folder)


@pytest.mark.parametrize(
    ("ids", "fault"),
    [
        (["34602", "34603"], "34604: no answer"),
        (["34602", "34603", "34604", "34604"], "34604: more than one answer"),
        (["34602", "34603", "34604", "1"], "1: no such question"),
    ],
)
def test_answers_that_do_not_fit_the_questions_are_refused(tmp_path: Path, ids: list[str], fault: str) -> None:
    items = TASK.read(published(tmp_path, prompts(), annotations()))
    (tmp_path / "answers.jsonl").write_text("\n".join(json.dumps({"question_id": i, "text": ""}) for i in ids))
    with pytest.raises(SampleInvalid, match=fault):
        read_answers(tmp_path / "answers.jsonl", items)
