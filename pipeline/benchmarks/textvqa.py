"""TextVQA's validation set as LLaVA asks it, with the words that an OCR system read given beside each question.

The folder is ``textvqa/`` of LLaVA's ``eval.zip`` (``llava_textvqa_val_v051_ocr.jsonl``) with the benchmark's own files
in it: ``TextVQA_0.5.1_val.json`` and ``train_images/``. LLaVA's question ids are image ids, which several questions
share, so a question's annotation is found by image and wording (LLaVA, ``eval_textvqa.py``).
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from pipeline.benchmarks.files import once, picture, read_rows, take
from pipeline.benchmarks.task import Item, Score, Task, accuracy
from pipeline.benchmarks.vqa import read_list, soft_accuracy, ten, tokenise
from schemas.errors import SampleInvalid, shown

PROMPTS, ANNOTATIONS, IMAGES = "llava_textvqa_val_v051_ocr.jsonl", "TextVQA_0.5.1_val.json", "train_images"
OCR = "Reference OCR token:"
# Of LLaVA's and TinyLLaVA's loaders.
MAX_NEW_TOKENS = 128

# Image id and question in lower case, to the annotations of it: question id and answers.
Annotations = dict[tuple[str, str], list[tuple[str, tuple[str, ...]]]]


def read(folder: Path) -> list[Item]:
    """The questions with their OCR lines; the reference is the ten annotators' answers.

    Raises:
        SampleInvalid: a file is not as published, a question has no annotation, or is asked more often than annotated.
    """
    path = folder / PROMPTS
    annotations = _annotations(folder / ANNOTATIONS)
    items = []
    for where, row in read_rows(path):
        image, prompt = take(row, where, "question_id", str), take(row, where, "text", str)
        wording = question(prompt, where)
        if not annotations[image, wording]:
            raise SampleInvalid(
                f"{where}: {shown(wording)}: image {image} has no (further) annotation of this question in "
                f"{folder / ANNOTATIONS}"
            )
        name, answers = annotations[image, wording].pop(0)
        file = picture(folder / IMAGES, take(row, where, "image", str), where)
        items.append(Item(name, prompt, (file,), answers))
    return once(items, folder / ANNOTATIONS)


def question(prompt: str, where: str) -> str:
    """The question in lower case, without the line of OCR words before or after it and without the instruction.

    Raises:
        SampleInvalid: the prompt has another form than LLaVA's.
    """
    lines = prompt.split("\n")
    if len(lines) == 3 and any(line.startswith(OCR) for line in lines):
        return lines[1 if lines[0].startswith(OCR) else 0].lower()
    if len(lines) == 2:
        return lines[0].lower()
    raise SampleInvalid(
        f"{where}: `text`: expected lines of question, `{OCR}` and instruction, as in LLaVA's file; got {shown(prompt)}"
    )


def score(items: Sequence[Item], answers: Sequence[str]) -> dict[str, Score]:
    """``accuracy``: the mean soft accuracy."""
    pairs = zip(items, answers, strict=True)
    return {"accuracy": accuracy([soft_accuracy(tokenise(a), [tokenise(r) for r in i.reference]) for i, a in pairs])}


def _annotations(path: Path) -> Annotations:
    found: Annotations = defaultdict(list)
    for where, row in read_list(path, "data"):
        key = take(row, where, "image_id", str), take(row, where, "question", str).lower()
        answers = ten(take(row, where, "answers", list), where)
        found[key].append((take(row, where, "question_id", str), answers))
    return found


TASK = Task("textvqa", MAX_NEW_TOKENS, read, score)
