"""MMBench's table: two questions with their rotations, and how answers are read without a judge."""

import base64
import csv
import io
from pathlib import Path

import pytest
from PIL import Image

from pipeline.benchmarks.mmbench import CIRCULAR, FILE, OFFSET, PROMPT, TABLES, TASK, letter
from pipeline.data.images import decode_image
from schemas.errors import SampleInvalid

HEADER = [
    "index",
    "question",
    "hint",
    *"ABCD",
    "answer",
    "category",
    "image",
    "source",
    "l2-category",
    "comment",
    "split",
]
ANIMALS = {"A": "cat", "B": "dog", "C": "horse", "D": "sea lion"}


def png(colour: str) -> str:
    sink = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(sink, "PNG")
    return base64.b64encode(sink.getvalue()).decode()


def row(index: int, question: str, options: list[str], answer: str, hint: str = "") -> dict[str, str]:
    letters = dict(zip("ABCD", [*options, "", ""], strict=False))
    named = {"hint": hint, "category": "object", "image": png("red"), "l2-category": "perception", "split": "dev"}
    return {"index": str(index), "question": question, **letters, "answer": answer, **named}


def published() -> list[dict[str, str]]:
    """A question of four options in all its rotations, and one of two, in the order of a shuffled table."""
    four = ["cat", "dog", "horse", "sea lion"]
    rows = [row(241 + n * OFFSET, "What is it?", four[n:] + four[:n], "BADC"[n]) for n in range(4)]
    two = [
        row(7, "Is it day?", ["yes", "no"], "A", "Look up."),
        row(7 + OFFSET, "Is it day?", ["no", "yes"], "B", "Look up."),
    ]
    for one in two:
        one["l2-category"] = "reasoning"
    return [rows[2], two[1], rows[0], rows[1], two[0], rows[3]]


def table(folder: Path, rows: list[dict[str, str]], name: str = TABLES[0]) -> Path:
    with (folder / name).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, HEADER, delimiter="\t", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return folder


def test_plain_task_asks_each_question_once_as_llava_words_it(tmp_path: Path) -> None:
    items = TASK.read(table(tmp_path, published()))
    assert [item.id for item in items] == ["7", "241"]
    assert items[0].prompt == f"Look up.\nIs it day?\nA. yes\nB. no\n{PROMPT}"
    assert items[1].prompt == f"What is it?\nA. cat\nB. dog\nC. horse\nD. sea lion\n{PROMPT}"
    assert decode_image(items[1].pictures()[0]).size == (4, 4)


def test_circular_task_asks_the_published_rotations(tmp_path: Path) -> None:
    items = CIRCULAR.read(table(tmp_path, published()))
    assert [int(item.id) for item in items] == [7, 1000007, 241, 1000241, 2000241, 3000241]
    assert items[3].prompt == f"What is it?\nA. dog\nB. horse\nC. sea lion\nD. cat\n{PROMPT}"


def test_rotations_are_made_where_the_table_has_none(tmp_path: Path) -> None:
    main = [r for r in published() if int(r["index"]) < OFFSET]
    made = CIRCULAR.read(table(tmp_path, main, TABLES[1]))
    (tmp_path / TABLES[1]).unlink()
    assert made == CIRCULAR.read(table(tmp_path, published()))


def test_plain_accuracy_is_by_question(tmp_path: Path) -> None:
    items = TASK.read(table(tmp_path, published()))
    found = {name: score.estimate()["value"] for name, score in TASK.score(items, ["yes", "C"]).items()}
    assert found == {"accuracy": 0.5, "perception": 0.0, "reasoning": 1.0}


@pytest.mark.parametrize(
    ("answers", "accuracy"),
    [
        (["A", "B", "B", "A", "D", "C"], 1.0),
        (["A", "B", "B", "A", "D", "A"], 0.5),  # one rotation of the four is wrong, so the question is
        (["A", "A", "B", "B", "B", "B"], 0.0),  # the same letter always, though it is right in each first rotation
        (["yes", "yes", "dog", "The answer is A", "(D)", "C."], 1.0),
        (["", "", "B", "A", "D", "C"], 0.5),
    ],
)
def test_circular_accuracy_needs_every_rotation(tmp_path: Path, answers: list[str], accuracy: float) -> None:
    items = CIRCULAR.read(table(tmp_path, published()))
    estimate = CIRCULAR.score(items, answers)["accuracy"].estimate()
    assert (estimate["value"], estimate["n"]) == (accuracy, 2)


def test_question_whose_rotations_a_limit_cut_off_does_not_count(tmp_path: Path) -> None:
    items = CIRCULAR.read(table(tmp_path, published()))[:3]
    assert CIRCULAR.score(items, ["A", "B", "B"])["accuracy"].estimate()["n"] == 1
    assert CIRCULAR.score(items[:1], ["A"]) == {}


def test_without_public_answers_there_is_no_score(tmp_path: Path) -> None:
    items = CIRCULAR.read(table(tmp_path, [r | {"answer": ""} for r in published()]))
    assert CIRCULAR.score(items, ["A"] * 6) == {}
    assert b"prediction" in CIRCULAR.files(items, ["A"] * 6)[FILE]


def test_submission_has_the_servers_columns_and_all_rotations(tmp_path: Path) -> None:
    items = CIRCULAR.read(table(tmp_path, published()))
    text = CIRCULAR.files(items, ["A", "B", "it\nis\ta dog", "A", "D", "C"])[FILE].decode()
    rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t"))
    assert [r["index"] for r in rows] == [item.id for item in items]
    assert list(rows[0])[:8] == ["index", "question", "A", "B", "C", "D", "prediction", "answer"]
    assert rows[2]["prediction"] == "it\nis\ta dog"
    assert (rows[1]["A"], rows[1]["C"], rows[1]["answer"]) == ("no", "", "B")


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("B. dog", "B"),
        ("Answer: B", "B"),
        ("**B**", "B"),
        ("The answer is B", "B"),
        ("The answer is A", "A"),
        ("dog", "B"),
        ("It is a Dog.", "B"),
        ("A brown dog runs after the ball", "B"),  # A is an article here: it is not among the last five words
        ("A or B", None),
        ("a cat or a dog", None),
        ("E", None),
        ("b", None),
        ("", None),
        ("It is neither of these, as far as one can tell from the picture, which shows a dog.", None),  # too long
    ],
)
def test_answers_are_read_without_a_judge(answer: str, read: str | None) -> None:
    assert letter(answer, ANIMALS) == read


def test_missing_options_end_the_list(tmp_path: Path) -> None:
    rows = [row(1, "Q?", ["one", "two", "nan", "four"], "B", hint="nan")]
    assert TASK.read(table(tmp_path, rows))[0].prompt == f"Q?\nA. one\nB. two\n{PROMPT}"


def test_question_may_hold_quotes_and_line_separators(tmp_path: Path) -> None:
    text = 'Which "sign"\nis\u2028this\x0c?'
    items = TASK.read(table(tmp_path, [row(1, text, ["x", "y"], "A"), row(2, "Q?", ["x", "y"], "A")]))
    assert [item.id for item in items] == ["1", "2"]
    assert items[0].prompt.startswith(text)


def test_picture_may_stand_in_another_row(tmp_path: Path) -> None:
    rows = [row(1, "Q?", ["x", "y"], "A"), row(2, "Q?", ["x", "y"], "A") | {"image": "1"}]
    items = TASK.read(table(tmp_path, rows))
    assert items[0].pictures() == items[1].pictures()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"image": "no base64 at all"}, "record 0: `image`: is no picture in base64"),
        ({"image": png("red")[:-3]}, "record 0: `image`: is no picture in base64"),
        ({"image": "99"}, "record 0: `image`: names row 99"),
        ({"image": ""}, "record 0: `image`: is empty"),
        ({"index": "one"}, "record 0: `index`: expected a number, got one"),
        ({"index": str(1 + OFFSET)}, "index 1000001: the table lacks its question 1"),
        ({"answer": "D"}, "record 0: `answer`: expected one of A, B, got D"),
        ({"B": ""}, "record 0: `A`, `B`: expected at least two options, got 1"),
    ],
)
def test_broken_rows_are_named(tmp_path: Path, change: dict[str, str], fault: str) -> None:
    folder = table(tmp_path, [row(1, "Q?", ["x", "y"], "A") | change])
    with pytest.raises(SampleInvalid, match=fault):
        TASK.read(folder)


def test_doubled_index_and_missing_table_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SampleInvalid, match="holds no table; expected one of mmbench_dev_20230712"):
        TASK.read(tmp_path)
    with pytest.raises(SampleInvalid, match="record 1: index 1: more than one row has it"):
        TASK.read(table(tmp_path, [row(1, "Q?", ["x", "y"], "A")] * 2))
