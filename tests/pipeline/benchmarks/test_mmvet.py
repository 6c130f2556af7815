"""MM-Vet as LLaVA lays it out: no score of our own, and the grader's predictions file."""

import json
from pathlib import Path

import pytest

from pipeline.benchmarks.mmvet import TASK
from schemas.errors import SampleInvalid
from tests.pipeline.benchmarks.layouts import shuffled, write_lines, write_picture

# Two questions of one image, and one with a separator that is a line's end to str.splitlines().
ROWS = [
    {"image": "v1_0.png", "text": "What is x in the equation?", "category": "conv", "question_id": 0},
    {"image": "v1_1.png", "text": "What is d in the\u2028last equation?", "category": "conv", "question_id": 1},
    {"image": "v1_1.png", "text": "What is x in the equation?", "category": "conv", "question_id": 2},
]


def write(folder: Path, rows: list[dict[str, object]]) -> None:
    write_lines(folder / "llava-mm-vet.jsonl", rows)
    for row in ROWS:
        write_picture(folder / "images" / str(row["image"]))


def test_questions_are_asked_as_they_stand(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    items = TASK.read(tmp_path)
    assert [item.prompt for item in items] == [row["text"] for row in ROWS]
    assert items[2].images == (tmp_path / "images/v1_1.png",)


def test_only_the_grader_scores(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    assert TASK.score(TASK.read(tmp_path), ["3", "4", "5"]) == {}


@pytest.mark.parametrize("seed", range(3))
def test_predictions_are_by_the_graders_ids_whatever_the_order(tmp_path: Path, seed: int) -> None:
    write(tmp_path, shuffled(ROWS, seed))
    items = TASK.read(tmp_path)
    texts = {"0": "x = −1\nor 5.", "1": "", "2": "Answer: (A)"}
    made = TASK.files(items, [texts[item.id] for item in items])
    assert list(made) == ["mm-vet.json"]
    assert json.loads(made["mm-vet.json"]) == {"v1_0": "x = −1\nor 5.", "v1_1": "", "v1_2": "Answer: (A)"}


def test_doubled_id_is_named(tmp_path: Path) -> None:
    write(tmp_path, [*ROWS, ROWS[2]])
    with pytest.raises(SampleInvalid, match=r"llava-mm-vet\.jsonl: 2: more than one question has this id"):
        TASK.read(tmp_path)


@pytest.mark.parametrize("field", ["question_id", "image", "text"])
def test_missing_field_is_named(tmp_path: Path, field: str) -> None:
    write(tmp_path, [ROWS[0], {name: value for name, value in ROWS[1].items() if name != field}])
    with pytest.raises(SampleInvalid, match=f"record 1: has no field `{field}`"):
        TASK.read(tmp_path)


def test_missing_picture_is_named(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    (tmp_path / "images/v1_1.png").unlink()
    with pytest.raises(SampleInvalid, match=r"record 1: image .*v1_1\.png: does not exist"):
        TASK.read(tmp_path)


def test_picture_elsewhere_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "mm-vet", [{**ROWS[0], "image": "../../secret.png"}])
    write_picture(tmp_path / "secret.png")
    with pytest.raises(SampleInvalid, match="lies outside"):
        TASK.read(tmp_path / "mm-vet")
