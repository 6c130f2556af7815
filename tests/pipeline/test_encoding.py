"""Encoding: what is supervised, whatever people wrote and whichever template renders it."""

import io
import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN as CLIP_MEAN
from transformers.image_utils import OPENAI_CLIP_STD as CLIP_STD

from jobs.demo import teacher_model
from pipeline.data.collate import model_inputs, pad_tokens, predicting_positions
from pipeline.data.conversations import IMAGE, Conversation, Turn
from pipeline.data.encoding import Encoder
from pipeline.data.processors import Processor, load_processor
from pipeline.data.templates import TEMPLATES
from pipeline.models import load_model
from schemas.config import TeacherConfig
from schemas.errors import ConfigInvalid, SampleInvalid
from tests.teachers import FAMILIES, WITH_IMAGES, write_teacher


def demo_processor() -> Processor:
    whole = teacher_model.build_processor()
    return Processor(whole.tokenizer, whole.chat_template, whole)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(demo_processor(), 200)


def conversation(*texts: str, images: int = 0) -> Conversation:
    turns = tuple(Turn("assistant" if i % 2 else "user", t) for i, t in enumerate(texts))
    return Conversation("f", "r", ("x.png",) * images, turns, {})


def supervised(encoder: Encoder, *texts: str, images: tuple[bytes, ...] = ()) -> list[str]:
    sample = encoder.encode(conversation(*texts, images=len(images)), images)
    return [encoder.tokenizer.decode(sample.input_ids[s:e]) for s, e in sample.spans]


def test_answers_and_their_end_tokens_are_supervised_in_every_turn(encoder: Encoder) -> None:
    assert supervised(encoder, "what ?", "red", "how many ?", "3 4") == ["red <|endoftext|>", "3 4 <|endoftext|>"]


def test_an_answer_that_contains_the_separator_is_supervised_whole(encoder: Encoder) -> None:
    assert supervised(encoder, "what ?", "red ASSISTANT: blue") == ["red assistant : blue <|endoftext|>"]


def test_image_positions_move_the_spans(encoder: Encoder, scenes_folder: Path) -> None:
    image = (scenes_folder / "images/train/000000.png").read_bytes()
    sample = encoder.encode(conversation("<image>\nwhat ?", "red", images=1), (image,))
    assert (sample.input_ids == encoder.processor.image_token_id).sum() == teacher_model.IMAGE_TOKENS
    assert supervised(encoder, "<image>\nwhat ?", "red", images=(image,)) == ["red <|endoftext|>"]
    prompt = encoder.prompt_ids(conversation("<image>\nwhat ?", "red", images=1), (image,))
    assert np.array_equal(prompt, sample.input_ids[: sample.spans[0, 0]])


def test_sample_id_changes_with_text_and_image_only(encoder: Encoder, scenes_folder: Path) -> None:
    first, second = ((scenes_folder / f"images/train/00000{i}.png").read_bytes() for i in (0, 1))
    ask = conversation("<image>\nwhat ?", "red", images=1)
    one = encoder.encode(ask, (first,)).sample_id
    renamed = Conversation("other", "other", ("y.png",), ask.turns, {"family": "z"})
    assert encoder.encode(renamed, (first,)).sample_id == one
    assert encoder.encode(ask, (second,)).sample_id != one
    assert encoder.encode(conversation("<image>\nwhat ?", "blue", images=1), (first,)).sample_id != one


def test_truncation_keeps_what_fits_and_refuses_what_leaves_no_answer(scenes_folder: Path) -> None:
    processor = demo_processor()
    image = (scenes_folder / "images/train/000000.png").read_bytes()
    whole = Encoder(processor, 200).encode(conversation("what ?", "1 2 3 4"), ())
    cut = Encoder(processor, len(whole.input_ids) - 2).encode(conversation("what ?", "1 2 3 4"), ())
    assert (cut.cut, cut.cut_response) == (2, 2)
    assert cut.response_tokens == whole.response_tokens - 2
    with pytest.raises(SampleInvalid, match="no answer token within max_length 5"):
        Encoder(processor, 5).encode(conversation("what ?", "1 2 3 4"), ())
    with pytest.raises(SampleInvalid, match="positions do not fit into max_length 20"):
        Encoder(processor, 20).encode(conversation("<image>\nwhat ?", "1", images=1), (image,))


def test_predicting_positions_stand_one_before_the_supervised_tokens() -> None:
    assert predicting_positions(np.array([[3, 5], [8, 9]])).tolist() == [2, 3, 7]
    ids, mask = pad_tokens([np.array([7, 8]), np.array([9])], 0, left=True)
    assert ids.tolist() == [[7, 8], [0, 9]]
    assert mask.tolist() == [[1, 1], [0, 1]]


# What people write into questions and answers: words, other scripts, marks of templates, blanks at either end.
BITS = (
    "red", "a dog", " ", "\n", "", "é", "日本語", "👩‍👩‍👧", "ß\u0301", "\u200b",
    "ASSISTANT: ", " ASSISTANT:", "USER: ",
    "</s>", "[/INST]",
    "<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "{{ 1 }}", "{% if %}", "\t", "\\n", "0", "'\"", "\ue000",
)  # fmt: skip


def random_text(generator: random.Random, most: int = 4) -> str:
    return "".join(generator.choice(BITS) for _ in range(generator.randint(0, most)))


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Processor]:
    folder = tmp_path_factory.mktemp("teachers")
    return {name: load_processor(write_teacher(name, folder / name)) for name in FAMILIES}


CASES = [(name, "own") for name, family in FAMILIES.items() if family.template] + [
    *(("llava-phi", template) for template in TEMPLATES if template != "pretrain"),
    ("phi", "phi"),
    ("mistral", "llama"),
]
TRIMMING = ("llama", "gemma2")


@pytest.mark.parametrize(("name", "template"), CASES)
def test_supervised_tokens_decode_to_exactly_the_answers_and_their_end_marks(
    processors: dict[str, Processor], name: str, template: str
) -> None:
    """Every byte is a token here, so nothing merges: what is supervised is the answer to the byte."""
    processor, generator = processors[name], random.Random(f"{name} {template}")
    encoder = Encoder(processor, 100_000, template)  # type: ignore[arg-type]
    _, ((start, stop),) = encoder.renderer.whole((Turn("user", "a"), Turn("assistant", "b")))
    end = encoder.renderer.whole((Turn("user", "a"), Turn("assistant", "b")))[0][start + 1 : stop]
    for _ in range(60):
        texts = [random_text(generator) for _ in range(2 * generator.randint(1, 3))]
        images = (b"",) * (name in WITH_IMAGES and generator.random() < 0.5)
        if name == "qwen3":  # its template takes thoughts out and blank lines off
            texts = [t.lstrip("\n") if i % 2 else t for i, t in enumerate(texts)]
        if images:
            texts[0] = f"{IMAGE}\n{texts[0]}"
        sample = encoder.encode(conversation(*texts, images=len(images)), [PICTURE] * len(images))
        found = [
            processor.tokenizer.decode(sample.input_ids[a:b], clean_up_tokenization_spaces=False)
            for a, b in sample.spans
        ]
        said = [t.strip() if name in TRIMMING else t for t in texts[1::2]]
        assert found == [t + end for t in said]
        around = np.ones(len(sample.input_ids), bool)
        for a, b in sample.spans:
            around[a:b] = False
        assert (sample.input_ids[~around] != processor.image_token_id).all()
        assert ((sample.input_ids == processor.image_token_id).sum() > 0) == bool(images)


def _picture() -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (40, 30)).save(sink, "PNG")
    return sink.getvalue()


PICTURE = _picture()


def test_sequences_begin_with_the_tokenizers_bos_once(processors: dict[str, Processor]) -> None:
    ask = conversation("what?", "red")
    for name, template, count in (
        ("llama", "own", 1),  # written by its template
        ("llava-1.5", "own", 1),  # added, as a processor does
        ("llava-1.5", "llama", 1),
        ("mistral", "llama", 1),
        ("qwen2", "own", 0),
    ):
        processor = processors[name]
        ids = Encoder(processor, 512, template).encode(ask, ()).input_ids.tolist()  # type: ignore[arg-type]
        assert ids.count(processor.tokenizer.bos_token_id) == count, (name, template)
        assert ids.index(processor.tokenizer.bos_token_id) == 0 if count else True


def test_several_images_have_their_positions_in_order_and_a_template_of_one_refuses_two(
    processors: dict[str, Processor],
) -> None:
    ask = conversation(f"{IMAGE}\n{IMAGE}\nwhich?", "one", images=2)
    for name in ("llava-1.5", "llava-next", "llava-onevision", "qwen2-vl", "qwen2.5-vl"):
        processor = processors[name]
        sample = Encoder(processor, 512).encode(ask, [PICTURE, PICTURE])
        expected = sum(processor.positions([(40, 30), (40, 30)]))
        assert (sample.input_ids == processor.image_token_id).sum() == expected
        assert sample.images == (PICTURE, PICTURE)
    with pytest.raises(SampleInvalid, match=r"record r: .* makes 1 places of this one's 2 images"):
        Encoder(processors["llava-phi"], 512, "phi").encode(ask, [PICTURE, PICTURE])


SIZES = [(1, 1), (3, 3), (50, 3), (3, 50), (1, 50), (28, 29), (640, 480), (97, 300)]


@pytest.mark.parametrize("name", WITH_IMAGES)
@torch.no_grad()
def test_images_of_any_size_have_as_many_positions_as_the_model_has_features(
    processors: dict[str, Processor], name: str, tmp_path: Path
) -> None:
    processor, model = processors[name], load_model(write_teacher(name, tmp_path), torch.float32, torch.device("cpu"))
    for sizes in [*([s] for s in SIZES), SIZES[4:6]]:
        counts = processor.positions(sizes)
        features = processor.features([Image.new("RGB", size) for size in sizes])
        ids = torch.tensor([[5, *(i for n in counts for i in [processor.image_token_id] * n + [6])]])
        # the model itself refuses other numbers
        model(**model_inputs(ids, [features], processor.image_token_id), attention_mask=torch.ones_like(ids))


def test_a_thread_of_an_image_is_a_bad_sample(processors: dict[str, Processor]) -> None:
    sink = io.BytesIO()
    Image.new("RGB", (401, 2)).save(sink, "PNG")
    ask = conversation(f"{IMAGE}\nwhat?", "a line", images=1)
    for name in WITH_IMAGES:
        with pytest.raises(SampleInvalid, match="record r: image: 401 × 2 pixels: one side is more than 200 times"):
            Encoder(processors[name], 512, "phi" if name == "llava-phi" else "own").encode(ask, [sink.getvalue()])


def test_a_long_image_that_is_padded_takes_no_gigabytes(tmp_path: Path) -> None:
    teacher = TeacherConfig(path=str(write_teacher("llava-1.5", tmp_path)), aspect="pad")
    processor = load_processor(teacher)
    tracemalloc.start()
    assert processor.positions([(100_000, 600)]) == [4]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**30  # numpy's part: the square of 8,192 pixels, a few times; of 100,000 it would be 30 GB


def test_models_that_see_images_as_they_are_leave_no_choice_of_aspect(processors: dict[str, Processor]) -> None:
    whole = processors["qwen2.5-vl"].whole
    with pytest.raises(ConfigInvalid, match=r"teacher\.aspect: `pad`: this model takes images as they are"):
        Processor(whole.tokenizer, None, whole, "pad")


def test_a_teacher_without_template_names_those_to_choose_from(processors: dict[str, Processor]) -> None:
    with pytest.raises(ConfigInvalid, match=r"prepare\.template: .* phi, llama, qwen2_base"):
        Encoder(processors["phi"], 512)


def test_what_a_template_refuses_is_a_bad_sample(processors: dict[str, Processor]) -> None:
    turns = (Turn("system", "be brief"), Turn("user", "what?"), Turn("assistant", "red"))
    ask = Conversation("f", "r", (), turns, {})
    with pytest.raises(SampleInvalid, match="record r: conversations: the chat template refuses it: System role not"):
        Encoder(processors["gemma2"], 512).encode(ask, ())
    assert "be brief" in Encoder(processors["qwen2"], 512).tokenizer.decode(
        Encoder(processors["qwen2"], 512).encode(ask, ()).input_ids
    )


def test_only_a_template_with_an_end_token_teaches_when_to_end(processors: dict[str, Processor]) -> None:
    assert not Encoder(processors["llava-1.5"], 512).renderer.has_end()
    assert Encoder(processors["llava-1.5"], 512, "llama").renderer.has_end()
    assert Encoder(processors["qwen2.5-vl"], 512).renderer.has_end()


@pytest.mark.parametrize("aspect", ["processor", "square", "pad"])
def test_aspect_decides_what_becomes_of_an_oblong_image(tmp_path: Path, aspect: str) -> None:
    teacher = TeacherConfig(path=str(write_teacher("llava-1.5", tmp_path)), aspect=aspect)  # type: ignore[arg-type]
    processor = load_processor(teacher)
    half = Image.new("RGB", (80, 40), "white")
    half.paste((255, 0, 0), (0, 0, 10, 40))  # a red edge of an eighth
    pixels = processor.features([half])["pixel_values"][0]
    mean, deviation = (np.array(x)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    shown = pixels * deviation + mean
    middle = shown[:, 14]
    if aspect == "processor":  # CLIP's cuts the sides off
        assert middle.min() > 0.95
    else:
        red = (middle[1] < 0.5).sum()
        assert red == pytest.approx(28 / 8, abs=1)
    bars = shown[:, 2, 14]
    grey = np.floor(255 * mean[:, 0, 0]) / 255
    assert np.allclose(bars, grey if aspect == "pad" else 1.0, atol=0.02)


def test_the_older_file_of_a_chat_template_is_read(tmp_path: Path) -> None:
    folder = write_teacher("qwen2.5-vl", tmp_path)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "processor_config.json").unlink()  # as Qwen2-VL's repositories have it
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_processor(folder).template == template
