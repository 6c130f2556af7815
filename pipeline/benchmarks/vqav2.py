"""VQAv2: scored here where the annotations are public, and the file that its server takes where they are not.

A folder holds the benchmark's own ``v2_OpenEnded_mscoco_<split>_questions.json``, for the score with
``v2_mscoco_<split>_annotations.json`` beside it, and the pictures in ``train2014/``, ``val2014/`` or ``test2015/``; or
LLaVA's question file ``llava_vqav2_mscoco_test-dev2015.jsonl`` with ``test2015/``. The server refuses a file that does
not answer all of test2015, so where LLaVA's ``llava_vqav2_mscoco_test2015.jsonl`` is there too, its other questions get
empty answers, as LLaVA's do.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.benchmarks.files import once, picture, read_json, read_rows, take
from pipeline.benchmarks.task import Item, Score, Task, by_group
from pipeline.benchmarks.vqa import SHORT, normalise, read_list, soft_accuracy, ten, tokenise
from schemas.errors import SampleInvalid

LLAVA, LLAVA_WHOLE = "llava_vqav2_mscoco_test-dev2015.jsonl", "llava_vqav2_mscoco_test2015.jsonl"
BEFORE, AFTER = "v2_OpenEnded_mscoco_", "_questions.json"
SUBMISSION = "vqav2_submission.json"
# Of LLaVA's and TinyLLaVA's loaders.
MAX_NEW_TOKENS = 128

# Question id to answer type and the annotators' answers.
Annotations = dict[int, tuple[str, tuple[str, ...]]]


@dataclass(frozen=True)
class Asked(Item):
    """A question of a set that is handed in whole: ``handed_in`` are the ids of all its questions."""

    handed_in: tuple[int, ...] = ()


def read(folder: Path) -> list[Item]:
    """The questions; with annotations the reference is the ten annotators' answers and the group the answer's type.

    Raises:
        SampleInvalid: a file is not as published, a question lacks its annotation, or the folder holds no questions or
            several sets of them.
    """
    path = _questions(folder)
    return _of_llava(path) if path.name == LLAVA else _official(path)


def score(items: Sequence[Item], answers: Sequence[str]) -> dict[str, Score]:
    """``accuracy``: the mean soft accuracy, and by type of answer; nothing without annotations.

    Both sides are normalised always. The official script leaves both as they are where all ten annotators wrote the
    same, so that a unanimous ``yes`` is not matched by ``Yes.``; as lmms-eval, we do not repeat that.
    """
    if any(item.reference is None for item in items):
        return {}
    pairs = zip(items, answers, strict=True)
    values = [soft_accuracy(normalise(a), [normalise(r) for r in i.reference]) for i, a in pairs]
    return by_group(values, [item.group for item in items])


def files(items: Sequence[Item], answers: Sequence[str]) -> Mapping[str, bytes]:
    """The submission: a JSON list of ``question_id`` and ``answer``, normalised as LLaVA does; "" where not asked."""
    said = {int(item.id): tokenise(answer) for item, answer in zip(items, answers, strict=True)}
    first = items[0]
    whole = first.handed_in if isinstance(first, Asked) and first.handed_in else tuple(said)
    rows = [{"question_id": number, "answer": said.get(number, "")} for number in whole]
    return {SUBMISSION: json.dumps(rows).encode()}


def _questions(folder: Path) -> Path:
    """The one question file to ask: with annotations before without, LLaVA's before the benchmark's."""
    official = sorted(folder.glob(f"{BEFORE}*{AFTER}"))
    annotated = [path for path in official if _annotation_file(path).is_file()]
    found = annotated or [path for path in [folder / LLAVA] if path.is_file()] or official
    if not found:
        raise SampleInvalid(f"{folder}: holds no questions; expected {BEFORE}<split>{AFTER} or {LLAVA}")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise SampleInvalid(f"{folder}: holds several sets of questions: {names}; give each a folder of its own")
    return found[0]


def _annotation_file(questions: Path) -> Path:
    split = questions.name.removeprefix(BEFORE).removesuffix(AFTER)
    return questions.with_name(f"v2_mscoco_{split}_annotations.json")


def _of_llava(path: Path) -> list[Item]:
    whole = path.with_name(LLAVA_WHOLE)
    ids = tuple(take(row, where, "question_id", int) for where, row in read_rows(whole)) if whole.is_file() else ()
    items: list[Item] = []
    for where, row in read_rows(path):
        file = picture(path.parent / "test2015", take(row, where, "image", str), where)
        number = str(take(row, where, "question_id", int))
        items.append(Asked(number, take(row, where, "text", str), (file,), handed_in=ids))
    if ids and (strange := {int(item.id) for item in items} - set(ids)):
        raise SampleInvalid(f"{path}: question {min(strange)}: is not in {whole}")
    return once(items, path)


def _official(path: Path) -> list[Item]:
    questions, annotations = read_list(path, "questions"), _annotations(_annotation_file(path))
    split = _split(path)
    items: list[Item] = []
    for where, row in questions:
        number = take(row, where, "question_id", int)
        if annotations and number not in annotations:
            raise SampleInvalid(f"{where}: question {number}: has no annotation in {_annotation_file(path)}")
        kind, answers = annotations.get(number, (None, None))
        name = f"COCO_{split}_{take(row, where, 'image_id', int):012d}.jpg"
        file = picture(path.parent / split, name, where)
        items.append(Asked(str(number), f"{take(row, where, 'question', str)}\n{SHORT}", (file,), answers, kind))
    return once(items, path)


def _split(path: Path) -> str:
    """The folder and the part of the names of a split's pictures: test-dev's are test's."""
    whole: dict[str, Any] = read_json(path)
    return take(whole, str(path), "data_subtype", str).replace("test-dev", "test")


def _annotations(path: Path) -> Annotations:
    found: Annotations = {}
    for where, row in read_list(path, "annotations") if path.is_file() else []:
        number = take(row, where, "question_id", int)
        if number in found:
            raise SampleInvalid(f"{where}: question {number}: has more than one annotation")
        said = [answer.get("answer") for answer in take(row, where, "answers", list) if isinstance(answer, dict)]
        found[number] = take(row, where, "answer_type", str), ten(said, where)
    return found


TASK = Task("vqav2", MAX_NEW_TOKENS, read, score, files)
