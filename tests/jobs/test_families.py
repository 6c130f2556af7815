"""Every family from its folder to a reloaded student, by the commands that a user types."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from cluster.session import session
from jobs.cli import app
from pipeline.data.collate import image_features, model_inputs
from pipeline.data.conversations import Conversation, Turn
from pipeline.data.encoding import Encoder
from pipeline.data.processors import load_processor
from pipeline.student import load_hybrid
from tests.processes import IN_A_SESSION
from tests.teachers import FAMILIES, WITH_IMAGES, write_teacher
from tests.tinyllava import write_checkpoint

# Every family takes a minute; the demo's teacher goes the same way in the default tests.
pytestmark = [*IN_A_SESSION, pytest.mark.slow]
# The one that learns from its own answers.
ANSWERS = "qwen2.5-vl"
NAMES = [*FAMILIES, "tinyllava"]
SEES = (*WITH_IMAGES, "tinyllava")
ONE_IMAGE_ONLY = ("llava-phi", "tinyllava")  # by their template


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    with session():
        yield


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    """A question, a conversation of two turns, a text alone and, where the family can, two images; each twice."""
    generator = np.random.default_rng(0)
    sizes = [(30, 40), (64, 28), (28, 28), (50, 50), (90, 31)]
    for i, (width, height) in enumerate(sizes):
        Image.fromarray(generator.integers(0, 255, (height, width, 3), np.uint8)).save(folder / f"{i}.png")
    seen = "<image>\n" if name in SEES else ""
    chat = [("human", f"{seen}what is this?"), ("gpt", "a dog"), ("human", "and its colour?"), ("gpt", "brown")]
    found: list[dict[str, Any]] = []
    for i in range(2):
        found += [
            {"image": f"{i}.png", "conversations": chat[:2]},
            {"image": f"{i + 2}.png", "conversations": chat},
            {"conversations": [("human", f"say {i}"), ("gpt", "hello")]},
        ]
        if seen and name not in ONE_IMAGE_ONLY:
            both = [("human", "<image>\n<image>\nwhich is larger?"), ("gpt", "the first")]
            found.append({"image": ["0.png", "4.png"], "conversations": both})
    for number, record in enumerate(found):
        record["id"] = str(number)
        record["conversations"] = [{"from": who, "value": text} for who, text in record["conversations"]]
        if not seen:
            record.pop("image", None)
    return found


def teacher_in(folder: Path, name: str) -> Path:
    if name != "tinyllava":
        return write_teacher(name, folder / "teacher")
    write_checkpoint(folder / "original", "phi")
    typed("import-teacher", str(folder / "original"), str(folder / "teacher"))
    return folder / "teacher"


def typed(*words: str) -> None:
    """A command as a user types it."""
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, f"{words}: {result.output} {result.exception}"


def aspect_of(name: str) -> str:
    return "pad" if name == "llava-1.5" else "processor"  # as LLaVA-1.5's own code has it


def run_settings(name: str, folder: Path) -> dict[str, Any]:
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records(folder, name)))
    files = {"data": str(folder / "data.jsonl"), "images": str(folder)}
    answers = {"max_new_tokens": 6} if name == ANSWERS else None
    template = "phi" if name in FAMILIES and FAMILIES[name].template is None else "own"
    return {
        "name": "family",
        "store": str(folder / "store"),
        "teacher": {"path": str(teacher_in(folder, name)), "aspect": aspect_of(name)},
        "prepare": {**files, "shard_rows": 3, "max_length": 512, "template": template, "answers": answers},
        "cache": {"taps": {"fraction": 1.0}},
        "student": {"layers": {"ratio": 0.5}},
        "distill": {
            "phases": [
                {"kind": "align", "steps": 2, "batch": 2, "lr": 1e-3},
                {"kind": "distill", "steps": 4, "batch": 2, "lr": 1e-3},
            ]
        },
        "evaluate": {**files, "max_new_tokens": 4, "untrained": False},
        "placement": {"cache": {"workers": 1, "cpus_per_worker": 0.75, "batch": 2, "decoders": 1}},
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("_ray")
def test_family_goes_from_a_folder_to_a_reloaded_student(name: str, tmp_path: Path) -> None:
    settings = run_settings(name, tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    for command in ("prepare", "cache", "distill", "evaluate", "export"):
        typed(command, str(path))
    store = tmp_path / "store"
    made = {
        kind: json.loads((store / kind / "family@1" / "record.json").read_text())["result"]
        for kind in ("prepare", "cache", "distill", "evaluate", "export")
    }
    count = len((tmp_path / "data.jsonl").read_text().splitlines())
    assert made["prepare"]["samples"] == made["cache"]["samples"] == count
    assert (made["distill"]["steps"], made["distill"]["replaced"]) == (6, [0] if name == "tinyllava" else [0, 2])
    assert np.isfinite(made["distill"]["last"]["kl"])
    assert made["evaluate"]["student"]["exact_match"]["overall"]["n"] == count
    assert made["evaluate"]["student"]["held_out_kl"] > 0
    assert made["export"]["logit_difference"] == 0
    student = load_hybrid(store / "export" / "family@1")
    processor = load_processor(str(store / "export" / "family@1"))
    assert processor.aspect == aspect_of(name)
    encoder = Encoder(processor, 512, settings["prepare"]["template"])
    images = [(tmp_path / "0.png").read_bytes()] if name in SEES else []
    ask = Conversation("", "", ("0.png",) * len(images), (Turn("user", "<image>\nso?" if images else "so?"),), {})
    ids = torch.from_numpy(encoder.prompt_ids(ask, images)).long()[None]
    inputs = model_inputs(ids, [image_features(processor, images)], processor.image_token_id)
    said = student.generate(**inputs, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert said.shape[1] > ids.shape[1]
