import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.conversations import Conversation, Turn, parse, part_conversations, read_conversations
from pipeline.data.images import read_images
from pipeline.data.records import parts
from pipeline.store import Store
from schemas.errors import SampleInvalid

GOOD = {
    "id": "a",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "red"}],
}
CHAT = [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "red"}]


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
        (changed(conversations=[GOOD["conversations"][0]] * 2), ["conversations.1:", "alternate"]),
        (changed(conversations=[{"from": "robot", "value": "x"}]), ["conversations.0", "human|gpt"]),
        (changed(image=None), ["1 <image> placeholders for 0 images"]),
        (changed(image=7), ["image", "expected a path", "7"]),
        (
            changed(conversations=[{"from": "human", "value": "hi"}, GOOD["conversations"][1]]),
            ["0 <image> placeholders for 1 images"],
        ),
    ],
)
def test_unusable_record_is_named_by_file_record_and_field(record: Any, says: list[str]) -> None:
    with pytest.raises(SampleInvalid) as caught:
        parse(record, "data.json", 3)
    for part in ["data.json", *says]:
        assert part in str(caught.value)


SAID = [Turn("system", "be brief"), Turn("user", "<image>\nwhat ?\n<image>"), Turn("assistant", "red")]
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}
LLAVA_TURNS = [{"from": SPEAKERS[turn.role], "value": turn.text} for turn in SAID]
CHAT_TURNS = [{"role": turn.role, "content": turn.text} for turn in SAID]
PARTS = [{"type": "image"}, {"type": "text", "text": "what ?"}, {"type": "image", "text": None}]
PART_TURNS = [CHAT_TURNS[0], {"role": "user", "content": PARTS}, CHAT_TURNS[2]]
UNSAID = {"from": "gpt", "value": "hello"}


@pytest.mark.parametrize(
    "fields",
    [
        {"conversations": LLAVA_TURNS},
        {"messages": LLAVA_TURNS, "conversations": None},
        {"messages": CHAT_TURNS, "conversations": []},
        {"conversations": PART_TURNS},
        {"messages": json.dumps(PART_TURNS)},
        {"conversations": [LLAVA_TURNS[0], UNSAID, *LLAVA_TURNS[1:]]},
        {"conversations": [{**t, "role": None, "content": None} for t in LLAVA_TURNS]},
    ],
)
@pytest.mark.parametrize(
    "images",
    [
        {"image": ["a.png", b"b"]},
        {"images": ["a.png", b"b"], "image": None},
        {"images": [{"path": "a.png", "bytes": None}, {"bytes": b"b", "path": "/elsewhere/b.png"}]},
    ],
)
def test_every_form_of_a_record_gives_the_same_conversation(fields: dict[str, Any], images: dict[str, Any]) -> None:
    found = parse({"id": 5, "topic": "x", **fields, **images}, "data.json", 3)
    assert found == Conversation("data.json", "5", ("a.png", b"b"), tuple(SAID), {"topic": "x"})


def test_a_leading_answer_is_dropped() -> None:
    found = parse({"conversations": [UNSAID, *CHAT]}, "data.json", 3)
    assert found == Conversation("data.json", "3", (), (Turn("user", "what ?"), Turn("assistant", "red")), {})


def test_records_without_answers_are_for_a_teacher_only() -> None:
    question, empty = {"from": "human", "value": "why ?"}, {"from": "gpt", "value": None}
    for turns, roles in [
        ([question], ["user"]),
        ([*CHAT, question], ["user", "assistant", "user"]),
        ([question, {"from": "gpt", "value": " "}], ["user", "assistant"]),
        ([question, empty, question], ["user", "assistant", "user"]),
        (CHAT, ["user", "assistant"]),
    ]:
        assert [t.role for t in parse({"conversations": turns}, "d", 0, answered=False).turns] == roles
        if turns is not CHAT:
            with pytest.raises(SampleInvalid, match=r"no answer|expected \{from"):
                parse({"conversations": turns}, "d", 0)
    with pytest.raises(SampleInvalid, match="the conversation has no question"):
        parse({"conversations": [UNSAID]}, "d", 0, answered=False)


def test_messages_are_short_printable_and_without_the_secrets_of_urls(tmp_path: Path) -> None:
    for record in [
        changed(image=["x" * 1000, 7]),
        changed(image={"bytes": None, "path": None}),
        changed(id="\ud800" * 500),
        changed(id="a\nb" * 500, conversations=None),
        changed(conversations="[" * 5000),
        changed(conversations=[{"from": "x" * 10**6, "value": {"a": ["b"] * 10**5}}]),
    ]:
        with pytest.raises(SampleInvalid) as caught:
            parse(record, "data.json", 3)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 400
    for url in ("https://user:secret@host/a.json", "s3://secret:secret@bucket/a.json?sig=secret"):
        with pytest.raises(SampleInvalid, match="credentials") as caught:
            list(read_conversations(url))
        assert "secret" not in str(caught.value)
    Store("memory://data").write("a.jsonl?sig=secret", b"{}\n")
    with pytest.raises(SampleInvalid, match=r"^memory://data/a\.jsonl: record 0") as caught:
        list(read_conversations("memory://data/a.jsonl?sig=secret"))
    assert "secret" not in str(caught.value)


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
        read_images(conversation, Store(str(tmp_path)), truncated="refuse")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(SampleInvalid, match=r"record a: image: .*a\.png: cannot be decoded"):
        read_images(conversation, Store(str(tmp_path)), truncated="refuse")


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
        assert {c.images for c in found} == {(b"\x89PNG",)}
        with pytest.raises(SampleInvalid, match="record 0: image: cannot be decoded"):
            read_images(found[0], Store(str(tmp_path)), truncated="refuse")
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
