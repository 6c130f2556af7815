"""Two hundred malformed records and images, drawn by one seed: each must end as an error that says where."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from jobs.stages import open_store, run_named
from pipeline.data.conversations import Conversation, part_conversations
from pipeline.data.images import read_images
from pipeline.data.records import parts
from pipeline.stage import require
from pipeline.store import Store
from schemas.config import RunConfig
from schemas.errors import SampleInvalid
from schemas.tables import REJECTS_FILE
from tests.pipeline.bombs import encoded, gif, jpeg, png, webp

SEED, EACH = 20260, 100
JUNK: list[Any] = [7, True, -1.5e300, {}, {"a": 1}, [None], [[[]]], [{"x": []}], {"bytes": 7}]
KINDS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")
FIELDS = ("image", "images", "conversations", "messages", "id")


def good(image: str = "a.png") -> dict[str, Any]:
    said = [
        {"from": "human", "value": "<image>\nwhat ?"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "and ?"},
        {"from": "gpt", "value": "blue"},
    ]
    return {"id": "good", "image": image, "conversations": said}


def line(change: Callable[[random.Random, dict[str, Any]], object]) -> Callable[[random.Random], bytes]:
    """A record changed in place, as a line of JSON."""

    def draw(chance: random.Random) -> bytes:
        record = good()
        change(chance, record)
        return json.dumps(record).encode()

    return draw


def any_turn(chance: random.Random, record: dict[str, Any]) -> dict[str, Any]:
    turn: dict[str, Any] = chance.choice(record["conversations"])
    return turn


def cut_line(chance: random.Random) -> bytes:
    whole = json.dumps(good()).encode()
    return whole[: chance.randrange(1, len(whole))]


def bad_bytes(chance: random.Random) -> bytes:
    whole = json.dumps(good()).encode()
    at = chance.randrange(1, len(whole))
    return whole[:at] + bytes([chance.choice([0, 0x80, 0xFF])]) + whole[at:]


# Each makes a record that no reading of it could use.
RECORDS: list[Callable[[random.Random], bytes]] = [
    cut_line,
    bad_bytes,
    lambda chance: chance.choice([b"null", b"3", b'"text"', b"[]", b"[{}]", b"{}", b"[" * 9000, b"9" * 9000]),
    line(lambda chance, r: r.pop(chance.choice(["image", "conversations"]))),
    line(lambda chance, r: r.update(id=chance.choice([[1], {}, {"a": []}, "\ud800"]))),
    line(lambda chance, r: r.update(image=chance.choice(JUNK))),
    line(lambda chance, r: r.update(images=chance.choice([*JUNK, "a.png"]))),
    line(lambda chance, r: r.update(messages=chance.choice([*JUNK, r["conversations"]]))),
    line(lambda chance, r: r.update(conversations=chance.choice([*JUNK, "no JSON", "[" * 9000, "7", ""]))),
    line(lambda chance, r: any_turn(chance, r).update({"from": chance.choice([*JUNK, "robot", "Human", ""])})),
    line(lambda chance, r: any_turn(chance, r).update(value=chance.choice([*JUNK, None]))),
    line(lambda chance, r: any_turn(chance, r).update(value="\udfff")),
    line(lambda chance, r: any_turn(chance, r).pop(chance.choice(["from", "value"]))),
    line(lambda chance, r: r["conversations"].pop(chance.randrange(1, 4))),
    line(lambda chance, r: r["conversations"].insert(chance.randrange(1, 4), chance.choice(JUNK))),
    line(lambda chance, r: r["conversations"].append({"from": "gpt", "value": "again"})),
    line(lambda chance, r: r["conversations"][-1].update(value=chance.choice(["", " ", "\n\t"]))),
    line(lambda chance, r: any_turn(chance, r).update(value="<image>" * chance.randrange(2, 99))),
    line(lambda chance, r: r.update(image=["a.png"] * chance.choice([0, 2, 50]))),
    line(lambda chance, r: r.update(image=chance.choice(["\ud83d.png", ["a\udc00"]]))),
]


def cut_image(chance: random.Random) -> bytes:
    whole = encoded(chance.choice(KINDS), (64, 64))
    return whole[: chance.randrange(len(whole) // 2)]


def headless(chance: random.Random) -> bytes:
    whole = encoded(chance.choice(KINDS), (64, 64))
    count = chance.randrange(2, 12)
    return chance.randbytes(count) + whole[count:]


def bomb(chance: random.Random) -> bytes:
    return chance.choice([jpeg, gif, lambda: webp(16383, 16383), lambda: png(60000, 60000)])()


# Files that are no pictures, whatever their names say.
IMAGES: list[Callable[[random.Random], bytes]] = [
    cut_image,
    headless,
    bomb,
    lambda chance: chance.randbytes(chance.randrange(200)),
    lambda chance: chance.choice([b"", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"P6 2 2 255 " + bytes(12)]),
    lambda chance: chance.choice([b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\0\0\0\0WEBPVP8X", b"\xff\xd8\xff"]),
]
# Names that are none of a file below the root.
NAMES = [
    "{secret}",
    "../secret.png",
    "a/../../secret.png",
    "%2e%2e/secret.png",
    "file://{secret}",
    "local://../secret.png",
    "~/../..{secret}",
    "..\\secret.png",
    "a.png\0",
    "",
    "x" * 300,
    "folder",
    "missing.png",
]


class Watched(Store):
    """Keeps the names of what it was asked for."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.asked: list[str] = []

    def fetch(self, name: str) -> bytes:
        self.asked.append(name)
        return super().fetch(name)


def image_record(number: int, chance: random.Random, root: Path) -> bytes:
    """A good record of a bad image, which is written below the root where it has a name there."""
    if number % 3 == 0:
        return json.dumps(good(chance.choice(NAMES).format(secret=root.parent / "secret.png"))).encode()
    name = f"folder/{number}.{chance.choice(['jpg', 'png', 'gif', 'webp'])}"
    (root / name).write_bytes(chance.choice(IMAGES)(chance))
    return json.dumps(good(name)).encode()


def outcome(item: Conversation | SampleInvalid, images: Store) -> Any:
    """The error that the record is or its images are, else what was read."""
    try:
        return item if isinstance(item, SampleInvalid) else read_images(item, images, truncated="refuse")
    except SampleInvalid as error:
        return error


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "folder").mkdir(parents=True)
    (folder / "a.png").write_bytes(encoded("PNG"))
    (tmp_path / "secret.png").write_bytes(encoded("PNG"))
    return folder


@pytest.fixture
def lines(root: Path) -> list[bytes]:
    """The malformed ones, written down beside the root, and a good one last."""
    chance = random.Random(SEED)
    lines = [RECORDS[i % len(RECORDS)](chance) for i in range(EACH)]
    lines += [image_record(i, chance, root) for i in range(EACH)]
    lines.append(json.dumps(good()).encode())
    (root.parent / "data.jsonl").write_bytes(b"\n".join(lines))
    return lines


def test_two_hundred_malformed_records_and_images_are_each_refused_by_file_record_and_field(
    root: Path, lines: list[bytes]
) -> None:
    path, store = root.parent / "data.jsonl", Watched(str(root))
    began = time.monotonic()
    found = [outcome(item, store) for part in parts(str(path), 64) for item in part_conversations(str(path), part)]
    # some hundred times what it takes: only a hang is that long
    assert time.monotonic() - began < 120
    assert len(found) == 2 * EACH + 1
    assert found.pop() == ((root / "a.png").read_bytes(),)
    for number, error in enumerate(found):
        assert isinstance(error, SampleInvalid), lines[number][:200]
        text = str(error)
        places = [f"{path}: record {number}: ", f"{path}: record {number} (id ", f"{path}: record good: image: "]
        assert any(text.startswith(place) for place in places), text
        named = any(f": {field}" in text for field in FIELDS)
        assert named or "cannot be read as JSON" in text or "expected an object" in text, text
        assert text.isprintable(), text
        assert len(text.replace(str(root.parent), "")) < 500, text
    assert store.asked
    for name in store.asked:
        assert (root / name).resolve().is_relative_to(root), name


def test_two_hundred_malformed_records_and_images_are_each_a_reject_row(
    root: Path, lines: list[bytes], settings: dict[str, Any]
) -> None:
    data = {"data": str(root.parent / "data.jsonl"), "images": str(root), "on_bad_sample": "skip", "shard_rows": 64}
    run = RunConfig.model_validate({**settings, "prepare": {**settings["prepare"], **data}})
    run_named("prepare", run, Console(quiet=True))
    store = open_store(run)
    counts = require(store, run.ref("prepare")).result
    assert (counts["samples"], counts["rejected"]) == (1, 2 * EACH)
    rejects = pq.read_table(store.path(f"{run.ref('prepare')}/{REJECTS_FILE}")).to_pylist()
    assert [r["record"] for r in rejects] == list(range(2 * EACH))
    assert all(r["reason"] and str(root.parent) not in r["reason"].replace("secret.png", "") for r in rejects[:EACH])
    strict = {**settings["prepare"], **data, "on_bad_sample": "fail", "artifact": "strict@1"}
    with pytest.raises(SampleInvalid, match=r"data\.jsonl: record 0"):
        run_named("prepare", RunConfig.model_validate({**settings, "prepare": strict}), Console(quiet=True))
