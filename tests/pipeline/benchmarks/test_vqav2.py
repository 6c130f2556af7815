"""VQAv2 in the benchmark's and in LLaVA's layout: score with annotations, submission without."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.benchmarks.vqav2 import LLAVA, LLAVA_WHOLE, SUBMISSION, TASK
from schemas.errors import SampleInvalid

QUESTIONS, ANNOTATED = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
ASKED = {
    262148000: ("Is the ball red?", "yes/no", ["yes"] * 10),
    262148001: ("How many people?", "number", ["2"] * 2 + ["3"] * 8),
    262148002: ("What is he wearing?", "other", ["t-shirt"] * 3 + ["a shirt"] * 7),
    262148003: ("Whose is it?", "other", ["woman's"] * 10),
}


def questions() -> list[dict[str, Any]]:
    return [{"image_id": 262148, "question": text, "question_id": number} for number, (text, *_) in ASKED.items()]


def annotations() -> list[dict[str, Any]]:
    return [
        {
            "question_id": number,
            "image_id": 262148,
            "question_type": "what",
            "answer_type": kind,
            "multiple_choice_answer": answers[0],
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(answers, 1)],
        }
        for number, (_, kind, answers) in ASKED.items()
    ]


def official(folder: Path, *, annotated: list[dict[str, Any]] | None = None, split: str = "val2014") -> Path:
    pictures = folder / split.replace("test-dev", "test")
    pictures.mkdir(exist_ok=True)
    (pictures / f"COCO_{pictures.name}_000000262148.jpg").write_bytes(b"picture")
    whole = {"data_type": "mscoco", "data_subtype": split, "task_type": "Open-Ended", "questions": questions()}
    (folder / f"v2_OpenEnded_mscoco_{split}_questions.json").write_text(json.dumps(whole))
    if annotated is not None:
        (folder / f"v2_mscoco_{split}_annotations.json").write_text(json.dumps({"annotations": annotated}))
    return folder


def llava(folder: Path, ids: list[int], whole: list[int] | None = None) -> Path:
    (folder / "test2015").mkdir()
    (folder / "test2015" / "COCO_test2015_000000262144.jpg").write_bytes(b"picture")
    image, text = "COCO_test2015_000000262144.jpg", "Is it?\nAnswer the question using a single word or phrase."
    rows = [{"question_id": n, "image": image, "text": text, "category": "default"} for n in whole or ids]
    for name, kept in ((LLAVA, ids), *([(LLAVA_WHOLE, whole)] if whole else [])):
        (folder / name).write_text("\n".join(json.dumps(row) for row in rows if row["question_id"] in kept))
    return folder


def values(task_scores: dict[str, Any]) -> dict[str, float]:
    return {name: score.estimate()["value"] for name, score in task_scores.items()}


def test_soft_accuracy_overall_and_by_type_of_answer(tmp_path: Path) -> None:
    items = TASK.read(official(tmp_path, annotated=annotations()))
    assert items[0].prompt == "Is the ball red?\nAnswer the question using a single word or phrase."
    assert items[0].images == (tmp_path / "val2014" / "COCO_val2014_000000262148.jpg",)
    # yes: 1; two of ten: 0.6; three of ten: 0.9; ten of ten: 1; (1 + 0.6 + 0.9 + 1) / 4; other: (0.9 + 1) / 2
    found = values(TASK.score(items, ["Yes.", "two", "T-shirt", "woman's"]))
    assert found == pytest.approx({"accuracy": 0.875, "yes/no": 1.0, "number": 0.6, "other": 0.95})


def test_without_annotations_there_is_a_submission_and_no_score(tmp_path: Path) -> None:
    items = TASK.read(official(tmp_path, split="test-dev2015"))
    answers = ["Yes.", "two", "The T-shirt", "woman's"]
    assert TASK.score(items, answers) == {}
    assert json.loads(TASK.files(items, answers)[SUBMISSION]) == [
        {"question_id": 262148000, "answer": "yes"},
        {"question_id": 262148001, "answer": "2"},
        {"question_id": 262148002, "answer": "t shirt"},
        {"question_id": 262148003, "answer": "woman 's"},
    ]


def test_submission_has_every_question_of_test2015_in_its_order(tmp_path: Path) -> None:
    items = TASK.read(llava(tmp_path, [7, 5], whole=[3, 5, 6, 7]))
    assert [item.id for item in items] == ["5", "7"]
    rows = json.loads(TASK.files(items[:1], ["No"])[SUBMISSION])
    assert rows == [{"question_id": n, "answer": "no" if n == 5 else ""} for n in (3, 5, 6, 7)]


def test_llavas_questions_alone_are_handed_in_as_they_are(tmp_path: Path) -> None:
    items = TASK.read(llava(tmp_path, [7, 5]))
    assert json.loads(TASK.files(items, ["no", ""])[SUBMISSION]) == [
        {"question_id": 7, "answer": "no"},
        {"question_id": 5, "answer": ""},
    ]


def test_annotated_questions_go_before_others(tmp_path: Path) -> None:
    official(tmp_path, annotated=annotations())
    items = TASK.read(llava(tmp_path, [7, 5]))
    assert [item.id for item in items] == [str(number) for number in ASKED]


def test_two_sets_of_questions_are_refused(tmp_path: Path) -> None:
    official(tmp_path)
    official(tmp_path, split="test2015")
    with pytest.raises(SampleInvalid, match=r"several sets of questions: .*test2015.*val2014"):
        TASK.read(tmp_path)


def test_folder_without_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SampleInvalid, match="holds no questions; expected v2_OpenEnded"):
        TASK.read(tmp_path)


def test_question_without_annotation_is_named(tmp_path: Path) -> None:
    folder = official(tmp_path, annotated=annotations()[1:])
    with pytest.raises(SampleInvalid, match=rf"question 262148000: has no annotation in .*{ANNOTATED}"):
        TASK.read(folder)


def test_doubled_questions_and_annotations_are_named(tmp_path: Path) -> None:
    folder = official(tmp_path, annotated=[*annotations(), annotations()[0]])
    with pytest.raises(SampleInvalid, match=r"annotations: record 4: question 262148000: has more than one annotation"):
        TASK.read(folder)
    (folder / ANNOTATED).write_text(json.dumps({"annotations": annotations()}))
    whole = {"data_subtype": "val2014", "questions": [questions()[0], questions()[0]]}
    (folder / QUESTIONS).write_text(json.dumps(whole))
    with pytest.raises(SampleInvalid, match="262148000: more than one question has this id"):
        TASK.read(folder)


def test_fields_of_another_kind_are_named(tmp_path: Path) -> None:
    broken = annotations()
    broken[2]["answers"] = [*broken[2]["answers"][:9], {"answer": 7}]
    with pytest.raises(SampleInvalid, match=r"annotations: record 2: `answers`: expected 10 texts"):
        TASK.read(official(tmp_path, annotated=broken))
    (tmp_path / QUESTIONS).write_text(json.dumps({"questions": questions()}))
    (tmp_path / ANNOTATED).write_text(json.dumps({"annotations": annotations()}))
    with pytest.raises(SampleInvalid, match="has no field `data_subtype`"):
        TASK.read(tmp_path)


def test_question_that_is_not_handed_in_is_refused(tmp_path: Path) -> None:
    folder = llava(tmp_path, [5, 7], whole=[5, 7])
    (folder / LLAVA_WHOLE).write_text(json.dumps({"question_id": 5}))
    with pytest.raises(SampleInvalid, match=f"question 7: is not in .*{LLAVA_WHOLE}"):
        TASK.read(folder)
