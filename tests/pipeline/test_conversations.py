import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.demo import teacher_model
from pipeline.data.collate import pad_tokens, predicting_positions
from pipeline.data.conversations import Conversation, Turn, parse, part_conversations, read_conversations
from pipeline.data.encoding import Encoder, read_image
from pipeline.data.records import parts
from pipeline.store import Store
from schemas.errors import SampleInvalid

GOOD = {
    "id": "a",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "red"}],
}


def changed(**fields: Any) -> dict[str, Any]:
    return {**GOOD, **fields}


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ("text", ["record 3", "expected an object"]),
        (changed(conversations=[]), ["record 3 (id a)", "conversations", "list of turns"]),
        (changed(conversations=GOOD["conversations"][:1]), ["(id a)", "the conversation has no answer"]),
        (
            changed(conversations=[GOOD["conversations"][0], {"from": "gpt", "value": "  "}]),
            ["(id a)", "the conversation has no answer"],
        ),
        (changed(conversations=[GOOD["conversations"][0]] * 2), ["conversations.1.from", "alternate"]),
        (changed(conversations=[{"from": "robot", "value": "x"}]), ["conversations.0", "human|gpt"]),
        (changed(image=None), ["1 <image> placeholders for no image"]),
        (changed(image=7), ["image", "expected a path", "7"]),
        (
            changed(conversations=[{"from": "human", "value": "hi"}, GOOD["conversations"][1]]),
            ["0 <image>", "one image"],
        ),
    ],
)
def test_unusable_record_is_named_by_file_record_and_field(record: Any, says: list[str]) -> None:
    with pytest.raises(SampleInvalid) as caught:
        parse(record, "data.json", 3)
    for part in ["data.json", *says]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.json", "[]", "the data set is empty"),
        ("a.jsonl", "\n", "the data set is empty"),
        ("a.json", "[{", "cannot be read as JSON"),
        ("a.json", "{}", "expected a JSON list"),
    ],
)
def test_unusable_file_is_named(tmp_path: Path, name: str, text: str, says: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(SampleInvalid, match=says) as caught:
        list(read_conversations(str(path)))
    assert str(path) in str(caught.value)
    with pytest.raises(SampleInvalid, match="no such data file"):
        list(read_conversations(str(tmp_path / "none.json")))


def test_json_and_json_lines_hold_the_same_conversations(tmp_path: Path) -> None:
    records = [changed(id=str(i), family="x") for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in records))
    listed, lines = (list(read_conversations(str(tmp_path / f"a.{kind}"))) for kind in ("json", "jsonl"))
    assert [(c.record, c.turns, c.extra) for c in listed] == [(c.record, c.turns, c.extra) for c in lines]
    assert listed[0].extra == {"family": "x"}


def test_missing_and_undecodable_images_are_named(tmp_path: Path) -> None:
    conversation = parse(GOOD, "data.json", 0)
    with pytest.raises(SampleInvalid, match=r"data\.json: record a: image: .*a\.png: No such file"):
        read_image(conversation, Store(str(tmp_path)))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(SampleInvalid, match=r"record a: image: .*a\.png: cannot be decoded"):
        read_image(conversation, Store(str(tmp_path)))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(teacher_model.build_processor(), 200)


def conversation(*texts: str, image: bool = False) -> Conversation:
    turns = tuple(Turn("assistant" if i % 2 else "user", t) for i, t in enumerate(texts))
    return Conversation("f", "r", "x.png" if image else None, turns, {})


def supervised(encoder: Encoder, *texts: str, image: bytes | None = None) -> list[str]:
    sample = encoder.encode(conversation(*texts, image=image is not None), image)
    return [encoder.tokenizer.decode(sample.input_ids[s:e]) for s, e in sample.spans]


def test_answers_and_their_end_tokens_are_supervised_in_every_turn(encoder: Encoder) -> None:
    assert supervised(encoder, "what ?", "red", "how many ?", "3 4") == ["red <|endoftext|>", "3 4 <|endoftext|>"]


def test_an_answer_that_contains_the_separator_is_supervised_whole(encoder: Encoder) -> None:
    assert supervised(encoder, "what ?", "red ASSISTANT: blue") == ["red assistant : blue <|endoftext|>"]


def test_image_positions_move_the_spans(encoder: Encoder, scenes_folder: Path) -> None:
    image = (scenes_folder / "images/train/000000.png").read_bytes()
    sample = encoder.encode(conversation("<image>\nwhat ?", "red", image=True), image)
    assert (sample.input_ids == encoder.image_token_id).sum() == teacher_model.IMAGE_TOKENS
    assert supervised(encoder, "<image>\nwhat ?", "red", image=image) == ["red <|endoftext|>"]
    prompt = encoder.prompt_ids(conversation("<image>\nwhat ?", "red", image=True), image)
    assert np.array_equal(prompt, sample.input_ids[: sample.spans[0, 0]])


def test_sample_id_changes_with_text_and_image_only(encoder: Encoder, scenes_folder: Path) -> None:
    first, second = ((scenes_folder / f"images/train/00000{i}.png").read_bytes() for i in (0, 1))
    ask = conversation("<image>\nwhat ?", "red", image=True)
    one = encoder.encode(ask, first).sample_id
    renamed = Conversation("other", "other", "y.png", ask.turns, {"family": "z"})
    assert encoder.encode(renamed, first).sample_id == one
    assert encoder.encode(ask, second).sample_id != one
    assert encoder.encode(conversation("<image>\nwhat ?", "blue", image=True), first).sample_id != one


def test_truncation_keeps_what_fits_and_refuses_what_leaves_no_answer(scenes_folder: Path) -> None:
    processor = teacher_model.build_processor()
    image = (scenes_folder / "images/train/000000.png").read_bytes()
    whole = Encoder(processor, 200).encode(conversation("what ?", "1 2 3 4"), None)
    cut = Encoder(processor, len(whole.input_ids) - 2).encode(conversation("what ?", "1 2 3 4"), None)
    assert cut.truncated
    assert cut.response_tokens == whole.response_tokens - 2
    with pytest.raises(SampleInvalid, match="no answer token within max_length 5"):
        Encoder(processor, 5).encode(conversation("what ?", "1 2 3 4"), None)
    with pytest.raises(SampleInvalid, match="positions do not fit into max_length 20"):
        Encoder(processor, 20).encode(conversation("<image>\nwhat ?", "1", image=True), image)


def test_predicting_positions_stand_one_before_the_supervised_tokens() -> None:
    assert predicting_positions(np.array([[3, 5], [8, 9]])).tolist() == [2, 3, 7]
    ids, mask = pad_tokens([np.array([7, 8]), np.array([9])], 0, left=True)
    assert ids.tolist() == [[7, 8], [0, 9]]
    assert mask.tolist() == [[1, 1], [0, 1]]


def test_parquet_with_image_bytes_holds_the_same_conversations(tmp_path: Path) -> None:
    records = [changed(id=str(i)) for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    image = {"bytes": b"\x89PNG", "path": None}
    rows = [{**r, "image": v} for r, v in zip(records, (image, image, image), strict=True)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    texts = [{**r, "conversations": json.dumps(r["conversations"]), "image": b"\x89PNG"} for r in records]
    pq.write_table(pa.Table.from_pylist(texts), tmp_path / "b.parquet")
    listed = [c.turns for c in read_conversations(str(tmp_path / "a.json"))]
    for name in ("a", "b"):
        found = list(read_conversations(str(tmp_path / f"{name}.parquet")))
        assert [c.turns for c in found] == listed
        assert {c.image for c in found} == {b"\x89PNG"}
        with pytest.raises(SampleInvalid, match="record 0: image: cannot be decoded"):
            read_image(found[0], Store(str(tmp_path)))
    (tmp_path / "c.parquet").write_text("no parquet")
    with pytest.raises(SampleInvalid, match="cannot be read as Parquet"):
        list(read_conversations(str(tmp_path / "c.parquet")))


def test_bad_records_among_good_ones_come_as_errors(tmp_path: Path) -> None:
    good = json.dumps(changed(image=None, conversations=CHAT))
    (tmp_path / "a.jsonl").write_text(f"{good}\n{{broken\n{json.dumps(changed(image=7))}\n{good}\n")
    path = str(tmp_path / "a.jsonl")
    (part,) = parts(path, 8)
    found = part_conversations(path, part)
    assert [type(item).__name__ for item in found] == ["Conversation", "SampleInvalid", "SampleInvalid", "Conversation"]
    assert "a.jsonl: record 1: cannot be read as JSON" in str(found[1])
    assert "expected a path" in str(found[2])


CHAT = [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "red"}]
