"""Figures with their intervals, and files of answers."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.benchmarks.files import once, picture, read_answers, read_json, read_rows, take
from pipeline.benchmarks.task import Item, Score, accuracy, mean, recovery, resamples
from pipeline.evaluation import proportion
from schemas.errors import SampleInvalid

ITEMS = [Item(str(i), "?") for i in range(3)]


def test_interval_of_a_proportion_is_near_wilsons() -> None:
    """Two methods for the same thing; at n = 400 both are within a few tenths of a point of the normal one."""
    hits = [1.0] * 300 + [0.0] * 100
    found = accuracy(hits).estimate()
    assert (found["value"], found["n"]) == (0.75, 400)
    assert found["ci95"] == pytest.approx(proportion(300, 400)["ci95"], abs=0.006)


def test_interval_covers_the_truth_19_times_of_20() -> None:
    """Of 100 samples of 60 questions the truth is missed by about 5; the percentile bootstrap misses a few more."""
    draw = np.random.default_rng(1)
    missed = 0
    for _ in range(100):
        low, high = accuracy(draw.random(60) < 0.6).estimate()["ci95"]
        missed += not low <= 0.6 <= high
    assert 1 <= missed <= 15  # a binomial of 0.05 to 0.07 a sample is outside of them less than once in a hundred times


def test_rows_are_drawn_whole_and_the_same_for_every_model() -> None:
    # the statistic sees both columns of a row together: their difference is 1 in every draw
    table = np.stack([np.arange(9.0), np.arange(9.0) + 1], axis=1)
    found = Score(table, lambda u: float((u[:, 1] - u[:, 0]).mean())).estimate()
    assert found == {"value": 1.0, "scale": 1.0, "n": 9, "ci95": [1.0, 1.0]}
    assert all(np.array_equal(a, b) for a, b in zip(resamples(7), resamples(7), strict=True))


def test_recovery_pairs_the_questions() -> None:
    teacher = accuracy([1, 1, 1, 0, 1, 1, 0, 1] * 20)
    assert recovery(teacher, teacher) == {"value": 1.0, "ci95": [1.0, 1.0]}
    half = Score(teacher.units_UC / 2, mean)
    assert recovery(half, teacher) == {"value": 0.5, "ci95": [0.5, 0.5]}
    assert recovery(teacher, accuracy([0] * 160)) == {"value": None, "ci95": None}


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answers_come_in_the_questions_order_under_either_pair_of_names(tmp_path: Path) -> None:
    rows = [{"question_id": 2, "answer": ""}, {"id": "0", "text": "a"}, {"question_id": 1, "text": "b"}]
    assert read_answers(write(tmp_path / "a.jsonl", rows), ITEMS) == ["a", "b", ""]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "0", "text": "a"}, {"id": "2", "text": "a"}], "1: no answer (1 of 3 questions)"),
        ([{"id": i % 3, "text": "a"} for i in range(5)], "0, 1: more than one answer (2 of 3 questions)"),
        ([{"id": i, "text": "a"} for i in range(4)], "3: no such question (1 of 3 questions)"),
        ([{"id": 0}], "record 0: has no field `text`"),
        ([{"text": "a"}], "record 0: has no field `id`"),
        ([{"id": 0, "text": 3.5}], "record 0: `text`: expected str, got float"),
        ([[1]], "record 0: is no object"),
        ([], "holds no records"),
    ],
)
def test_bad_files_of_answers_are_told_by_id_and_field(tmp_path: Path, rows: list[object], message: str) -> None:
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(SampleInvalid) as caught:
        read_answers(path, ITEMS)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_broken_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(SampleInvalid, match=r"none\.json: cannot be read: No such file"):
        read_json(tmp_path / "none.json")
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a":')
    with pytest.raises(SampleInvalid, match=r"a\.jsonl: line 2: is not JSON"):
        read_rows(tmp_path / "a.jsonl")
    (tmp_path / "b.json").write_bytes(b"\xff")
    with pytest.raises(SampleInvalid, match=r"b\.json: is not UTF-8"):
        read_rows(tmp_path / "b.json")


def test_only_line_breaks_end_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": "x\u2028y"}\r\n\n{"a": "z"}', newline="")
    assert [row["a"] for _, row in read_rows(tmp_path / "a.jsonl")] == ["x\u2028y", "z"]
    (tmp_path / "a.tsv").write_text("a\tb\nx\u2028y\tz\n")
    assert [row for _, row in read_rows(tmp_path / "a.tsv")] == [{"a": "x\u2028y", "b": "z"}]


def test_tables_are_read_with_fields_that_hold_tabs_quotes_and_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('index\tquestion\timage\n7\t"two\nlines\tand ""quotes"""\t' + "A" * 200_000 + "\n")
    [(where, row)] = read_rows(tmp_path / "a.tsv")
    assert take(row, where, "question", str) == 'two\nlines\tand "quotes"'
    assert len(row["image"]) == 200_000


def test_pictures_lie_inside_and_ids_differ(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out.png").write_bytes(b"")
    with pytest.raises(SampleInvalid, match=r"here: image \.\./out\.png: lies outside"):
        picture(tmp_path / "in", "../out.png", "here")
    with pytest.raises(SampleInvalid, match=r"here: image .*none.png: does not exist"):
        picture(tmp_path / "in", "none.png", "here")
    assert once(ITEMS, "file") == ITEMS
    with pytest.raises(SampleInvalid, match="file: 0: more than one question has this id"):
        once([*ITEMS, ITEMS[0]], "file")
