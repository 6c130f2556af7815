import json
from pathlib import Path

import numpy as np
import pytest

from jobs.demo import teacher_model
from jobs.demo.data import write_split
from jobs.demo.scenes import FAMILIES, Digit, Strokes, draw_sample, sample_rng


def strokes_of(split: str) -> set[bytes]:
    return {i.tobytes() for images in Strokes(split).by_class for i in images}  # type: ignore[arg-type]


def test_no_stroke_is_in_two_splits() -> None:
    train, val, test = (strokes_of(s) for s in ("train", "val", "test"))
    assert len(train) > 1000
    assert len(test) > 300
    assert not train & val
    assert not train & test
    assert not val & test


def test_a_sample_is_a_function_of_split_seed_and_index() -> None:
    strokes = Strokes("test")

    def draw(seed: int, index: int) -> tuple[bytes, str, str]:
        scene, question = draw_sample(strokes, sample_rng("test", seed, index), "reading", augment=False)
        return scene.image.tobytes(), question.text, question.answer

    assert draw(0, 3) == draw(0, 3)
    assert len({draw(0, 3), draw(1, 3), draw(0, 4)}) == 3


DIGITS = (
    Digit(7, "red", 0, 40, 14),
    Digit(2, "blue", 20, 0, 14),
    Digit(7, "green", 40, 20, 14),
    Digit(9, "white", 50, 45, 14),
)
ANSWERS = {
    "read the digits from left to right": "7 2 7 9",
    "how many digits are a 7 ?": "2",
    "how many digits are a 3 ?": "0",
    "what colour is the 9 ?": "white",
    "what colour is the 2 ?": "blue",
    "which digit is next left of the 2 ?": "7",
    "which digit is next right of the 2 ?": "7",
    "which digit is next left of the 9 ?": "7",
    "what is the largest digit ?": "9",
    "what is the smallest digit ?": "2",
    "what is the sum of the digits ?": "25",
    "which digit is next above the 9 ?": "7",
}


def test_questions_have_the_right_answers() -> None:
    asked = {}
    for family, make in FAMILIES.items():
        for index in range(200):
            question = make(DIGITS, sample_rng("test", 0, index))
            if question is not None:
                assert question.family == family
                asked[question.text] = question.answer
    assert {text: asked[text] for text in ANSWERS} == ANSWERS
    assert not any("colour is the 7" in text or "of the 7" in text for text in asked)


def test_every_question_and_answer_is_in_the_vocabulary() -> None:
    tokenizer, strokes = teacher_model.build_tokenizer(), Strokes("val")
    for index in range(300):
        family = list(FAMILIES)[index % len(FAMILIES)]
        _, question = draw_sample(strokes, sample_rng("val", 0, index), family, augment=True)
        ids = tokenizer.encode(f"USER: {question.text} ASSISTANT: {question.answer}")
        assert tokenizer.unk_token_id not in ids, question
        assert tokenizer.decode(tokenizer.encode(question.answer)) == question.answer


def test_files_are_llava_conversations_with_families_in_turn(tmp_path: Path) -> None:
    path = tmp_path / "val.json"
    write_split(path, "val", 12, seed=0)
    records = json.loads(path.read_text())
    assert [r["family"] for r in records] == list(FAMILIES) * 2
    before = path.stat().st_mtime_ns
    write_split(path, "val", 12, seed=0)
    assert path.stat().st_mtime_ns == before
    write_split(path, "val", 6, seed=0)
    assert json.loads(path.read_text()) == records[:6]
    assert all((tmp_path / r["image"]).is_file() for r in records)
    assert all([t["from"] for t in r["conversations"]] == ["human", "gpt"] for r in records)


def test_teacher_trains_on_the_very_tokens_that_prepare_makes(scenes_folder: Path) -> None:
    from jobs.demo import train_teacher
    from pipeline.data.conversations import read_conversations
    from pipeline.data.encoding import Encoder
    from pipeline.data.images import read_images
    from pipeline.data.processors import Processor
    from pipeline.store import Store

    whole = teacher_model.build_processor()
    encoder, strokes = Encoder(Processor(whole.tokenizer, whole.chat_template, whole), 128), Strokes("train")
    drawn, samples = [], []
    for index, conversation in enumerate(read_conversations(str(scenes_folder / "train.json"))):
        family = list(FAMILIES)[index % len(FAMILIES)]
        drawn.append(draw_sample(strokes, sample_rng("train", 0, index), family, augment=True))
        samples.append(
            encoder.encode(conversation, read_images(conversation, Store(str(scenes_folder)), truncated="refuse"))
        )
    batch = train_teacher.encode(encoder.tokenizer, drawn)
    for ids, labels, sample in zip(batch["ids"].numpy(), batch["labels"].numpy(), samples, strict=True):
        ((start, stop),) = sample.spans
        assert np.array_equal(ids[: len(sample.input_ids)], sample.input_ids)
        assert np.array_equal(np.flatnonzero(labels != -100), np.arange(start, stop))
        assert np.array_equal(labels[start:stop], ids[start:stop])
    pixels = train_teacher.pixels(batch["images"])
    ours = encoder.processor.image_processor([scene.image for scene, _ in drawn], return_tensors="pt")["pixel_values"]
    # the processor scales by 1/255 and then by the mean and deviation: float32 rounding apart, the same
    assert float((pixels - ours).abs().max()) < 1e-6


def test_augmentation_bends_strokes() -> None:
    strokes = Strokes("train")
    plain, bent = (draw_sample(strokes, sample_rng("train", 0, 0), "largest", augment=a)[0] for a in (False, True))
    assert not np.array_equal(np.asarray(plain.image), np.asarray(bent.image))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "processor_config.json", "README.md"]
)
def test_shipped_teacher_is_complete_and_small(name: str) -> None:
    folder = Path("jobs/demo/teacher")
    assert (folder / name).is_file()
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 16 * 2**20
