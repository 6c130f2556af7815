"""MMMU's validation set in both published forms, and how its answers are read."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.benchmarks.mmmu import OUTPUT, PROMPTS, TASK, letter, task
from pipeline.benchmarks.open_answers import is_right, taken
from schemas.errors import SampleInvalid

COSTS = {"A": "$6", "B": "$7", "C": "$8", "D": "$9"}
LONG = {"A": "the left ventricle", "B": "the right ventricle", "C": "the aorta"}
LETTER = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."
NAMES = ("validation_Accounting_1", "validation_Art_Theory_2", "validation_Electronics_3")
PROMPTED = (
    f"<image 1> What are the costs?\n(A) $6\n(B) $7\n(C) $8\n(D) $9\n\n{LETTER}",
    f"Compare <image 1> and <image 2>.\n(A) alike\n(B) not alike\n\n{LETTER}",
    f"Find the current in <image 1>.\n{SHORT}",
)


def png(colour: str) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (2, 2), colour).save(sink, "PNG")
    return sink.getvalue()


def annotations() -> list[dict[str, Any]]:
    """As in TinyLLaVA's file the question with two pictures has none."""
    choice = {"question_type": "multiple-choice"}
    return [
        {"id": NAMES[0], **choice, "all_choices": list(COSTS), "index2ans": COSTS, "image": "1.png"},
        {"id": NAMES[1], **choice, "all_choices": ["A", "B"], "index2ans": {"A": "alike", "B": "not alike"}},
        {"id": NAMES[2], "question_type": "short-answer", "image": "3.png"},
    ]


def llava(folder: Path, asked: list[dict[str, Any]] | None = None, key: dict[str, Any] | None = None) -> Path:
    (folder / "all_images").mkdir()
    (folder / "eval").mkdir()
    for name in ("1.png", "3.png"):
        (folder / "all_images" / name).write_bytes(png("red"))
    rows = [{"prompt": text, **row} for text, row in zip(PROMPTED, asked or annotations(), strict=True)]
    (folder / PROMPTS).write_text(json.dumps(rows))
    right = dict(zip(NAMES, ("B", "A", "8.4"), strict=True))
    kinds = dict(zip(NAMES, ("multiple-choice", "multiple-choice", "short-answer"), strict=True))
    answers = {name: {"question_type": kinds[name], "ground_truth": right[name]} for name in NAMES}
    (folder / "eval" / "answer_dict_val.json").write_text(json.dumps(answers if key is None else key))
    return folder


def row(name: str, question: str, options: list[str], answer: str, kind: str = "multiple-choice") -> dict[str, Any]:
    pictures = [{"bytes": png(colour), "path": f"{name}.png"} for colour in ("red", "blue")]
    images = {"image_1": pictures[0], "image_2": pictures[1]}
    return {
        "id": name,
        "question": question,
        "options": str(options),
        "answer": answer,
        "question_type": kind,
        **images,
    }


def rows() -> list[dict[str, Any]]:
    return [
        row(NAMES[0], "<image 1> What are the costs?", list(COSTS.values()), "B"),
        row(NAMES[1], "Compare <image 1> and <image 2>.", ["alike", "not alike"], "A"),
        row(NAMES[2], "Find the current in <image 1>.", [], "['8.4', '8.40 A']", "open"),
    ]


def parquet(folder: Path, given: list[dict[str, Any]]) -> Path:
    for one in given:
        subject = folder / "_".join(one["id"].split("_")[1:-1])
        subject.mkdir()
        pq.write_table(pa.Table.from_pylist([one]), subject / "validation-00000-of-00001.parquet")
    return folder


def values(scores: dict[str, Any]) -> dict[str, float]:
    return {name: score.estimate()["value"] for name, score in scores.items()}


def test_both_published_forms_ask_the_same(tmp_path: Path) -> None:
    for name in ("llava", "parquet"):
        (tmp_path / name).mkdir()
    ours, theirs = TASK.read(llava(tmp_path / "llava")), TASK.read(parquet(tmp_path / "parquet", rows()))
    assert [i.prompt for i in ours] == [i.prompt for i in theirs] == list(PROMPTED)
    assert [i.id for i in ours] == [i.id for i in theirs] == list(NAMES)
    assert [i.group for i in ours] == ["Business", "Art and Design", "Tech and Engineering"]
    assert [len(i.images) for i in ours] == [1, 0, 1]
    assert theirs[1].pictures() == (png("red"), png("blue"))


def test_accuracy_over_all_questions_and_by_discipline(tmp_path: Path) -> None:
    items = TASK.read(parquet(tmp_path, rows()))
    # right, wrong, right to two decimals: 2 / 3
    found = values(TASK.score(items, ["(B)", "B", "The current is 8.401."]))
    assert found.pop("accuracy") == pytest.approx(2 / 3)
    assert found == {"Business": 1.0, "Art and Design": 0.0, "Tech and Engineering": 1.0}


def test_no_option_is_drawn_without_a_seed(tmp_path: Path) -> None:
    items = TASK.read(llava(tmp_path))
    answers = ["no idea", "A", "8.4"]  # the second is right, but there was no picture to see it by
    assert values(TASK.score(items, answers))["accuracy"] == pytest.approx(1 / 3)
    assert json.loads(TASK.files(items, answers)[OUTPUT]) == {NAMES[0]: "", NAMES[1]: "", NAMES[2]: "8.4"}


def test_with_a_seed_options_are_drawn_evenly_and_alike_each_time(tmp_path: Path) -> None:
    items, answers = TASK.read(llava(tmp_path)), ["no idea", "B", "none"]
    drawn = [json.loads(task(seed).files(items, answers)[OUTPUT]) for seed in range(400)]
    assert drawn == [json.loads(task(seed).files(items[::-1], answers[::-1])[OUTPUT]) for seed in range(400)]
    for name, options in ((NAMES[0], "ABCD"), (NAMES[1], "AB")):
        shares = [sum(d[name] == option for d in drawn) / len(drawn) for option in options]
        # four standard deviations of the share of 400 draws at a half
        assert shares == pytest.approx([1 / len(options)] * len(options), abs=0.1)
    scores = [values(task(seed).score(items, answers))["accuracy"] for seed in range(8)]
    assert scores == [((d[NAMES[0]] == "B") + (d[NAMES[1]] == "A")) / 3 for d in drawn[:8]]


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("Answer: B", "B"),
        ("The answer is B", "B"),
        ("The answer is B.", "B"),
        ("(A) is wrong, so (C)", "C"),  # the last in brackets
        ("A is wrong so it must be C", "C"),  # the last between blanks
        ("(A), not B", "A"),  # brackets go before blanks
        ("B) the right ventricle", None),  # neither in brackets nor between blanks, and too short for its text
        ("I would say that it is the right ventricle", "B"),
        ("not the aorta but rather the left ventricle", "A"),
        ("the right ventricle", None),
        ("b", None),
        ("D", None),
        ("", None),
    ],
)
def test_letters_are_read_by_mmmus_rules(answer: str, read: str | None) -> None:
    assert letter(answer, LONG) == read


@pytest.mark.parametrize(
    ("answer", "right", "hit"),
    [
        ("8.4", ["8.4"], True),
        ("8.404", ["8.4"], True),  # both to two decimals
        ("8.41", ["8.4"], False),
        ("1,000 units", ["1000"], True),
        ("2e3", ["2000"], True),
        ("x = 5", ["5"], True),
        ("The result is 12 and so 7", ["7"], True),
        ("The result is 12 and so 7", ["12"], False),  # only the shortest end is taken
        ("Trematodes", ["trematode"], True),  # contained
        ("tremat", ["trematode"], False),
        ("Parvovirus", ["HPV", "parvovirus"], True),
        ("s", ["s"], True),
        ("yes", ["s"], False),  # a letter alone needs a blank beside it
        ("", ["5"], False),
    ],
)
def test_open_answers_are_read_by_mmmus_rules(answer: str, right: list[str], hit: bool) -> None:
    assert is_right(answer, right) is hit


def test_lines_are_read_one_by_one_and_sentences_are_not() -> None:
    # of each line the shortest end, as a number where it is one, and then the numbers in both ends
    assert taken("It is 3.\nSo the answer is 4. Or is it 5") == [3.0, "it 5", 3.0, 5.0]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"options": "['a'"}, "row 0: `options`: expected a list in Python's spelling"),
        ({"options": "[]"}, "row 0: a question of multiple choice has no options"),
        ({"image_1": {"bytes": None, "path": "x"}}, "row 0: `image_1`: holds no picture"),
        ({"question": "<image 3>"}, "row 0: has no field `image_3`"),
        ({"answer": ""}, "row 0: `answer`: expected a text or a list of texts"),
        ({"id": "validation_Magic_1"}, "row 0: `id`: expected <split>_<subject>_<number>, got validation_Magic_1"),
    ],
)
def test_broken_rows_are_named(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    folder = parquet(tmp_path, [rows()[0] | change])
    with pytest.raises(SampleInvalid, match=fault):
        TASK.read(folder)


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(SampleInvalid, match=r"holds neither anns_for_eval.json nor validation-\*.parquet"):
        TASK.read(tmp_path)
    (tmp_path / "validation-00000-of-00001.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(SampleInvalid, match="cannot be read as Parquet"):
        TASK.read(tmp_path)


def test_question_without_answer_is_named(tmp_path: Path) -> None:
    with pytest.raises(SampleInvalid, match=rf"record 0: question {NAMES[0]}: has no answer in .*answer_dict_val.json"):
        TASK.read(llava(tmp_path, key={}))


def test_doubled_ids_are_refused(tmp_path: Path) -> None:
    doubled = annotations()
    doubled[2]["id"] = NAMES[0]
    with pytest.raises(SampleInvalid, match=f"{NAMES[0]}: more than one question has this id"):
        TASK.read(llava(tmp_path, doubled))
