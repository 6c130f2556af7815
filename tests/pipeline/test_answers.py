"""The teacher's own answers as data: what they are, and that killed and resumed stages make the same."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from jobs.stages import open_store, run_named
from pipeline.data.processors import load_processor
from pipeline.data.samples import decode_samples
from pipeline.models import load_model
from pipeline.shards import read_manifest, read_shard
from schemas.config import RunConfig
from schemas.errors import ArtifactDrift, SampleInvalid
from schemas.tables import SAMPLES
from tests.teachers import write_teacher

QUIET = Console(file=io.StringIO())
RECORDS: list[dict[str, Any]] = [
    {"id": "one", "conversations": [{"from": "human", "value": "what is it?"}]},
    {
        "id": "two",
        "conversations": [
            {"from": "human", "value": "first"},
            {"from": "gpt", "value": "the data's answer"},
            {"from": "human", "value": "then?"},
            {"from": "gpt", "value": "another of the data's"},
        ],
    },
    {"id": "three", "conversations": [{"from": "human", "value": "and now"}]},
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_teacher("qwen2", tmp_path_factory.mktemp("teacher")))


def run_of(teacher: str, folder: Path, records: list[dict[str, Any]] = RECORDS, **prepare: Any) -> RunConfig:
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    data = {"data": str(folder / "data.jsonl"), "shard_rows": 2, "max_length": 256}
    return RunConfig.model_validate(
        {
            "name": "answers",
            "store": str(folder / "store"),
            "teacher": {"path": teacher},
            "prepare": {**data, "answers": {"max_new_tokens": 5}, **prepare},
            "student": {"layers": {"ratio": 0.5}},
            "distill": {"phases": [{"kind": "align", "steps": 1, "batch": 1}]},
            "evaluate": {"data": "none"},
            "placement": {"prepare": {"workers": 0}},
        }
    )


def answers(run: RunConfig) -> dict[str, list[str]]:
    """By record: what is supervised."""
    store, tokenizer = open_store(run), load_processor(run.teacher).tokenizer
    found = {}
    for info in read_manifest(store, run.ref("prepare")).shards:
        for row in decode_samples(read_shard(store, run.ref("prepare"), SAMPLES, info)):
            found[row.record] = [tokenizer.decode(row.input_ids[a:b]) for a, b in row.spans]
    return found


@torch.no_grad()
def test_answers_are_the_teachers_greedy_ones_turn_by_turn(teacher: str, tmp_path: Path) -> None:
    run = run_of(teacher, tmp_path)
    run_named("prepare", run, QUIET)
    model, tokenizer = load_model(teacher, torch.float32, torch.device("cpu")), load_processor(teacher).tokenizer
    expected: dict[str, list[str]] = {}
    for record in RECORDS:
        messages: list[dict[str, str]] = []
        for turn in (t for t in record["conversations"] if t["from"] == "human"):
            messages.append({"role": "user", "content": turn["value"]})
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            for _ in range(5):
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
                if ids[0, -1] == tokenizer.eos_token_id:
                    break
            start = len(tokenizer(text, add_special_tokens=False).input_ids)
            said = tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
            messages.append({"role": "assistant", "content": said})
            expected.setdefault(record["id"], []).append(said + "<|im_end|>")
    assert answers(run) == expected
    assert len(expected["two"]) == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_shard_that_was_lost_is_answered_alike_again(teacher: str, tmp_path: Path, temperature: float) -> None:
    how = {"max_new_tokens": 5, "temperature": temperature, "seed": 3}
    run = run_of(teacher, tmp_path, answers=how)
    run_named("prepare", run, QUIET)
    folder = Path(run.store.url) / str(run.ref("prepare"))
    shards = {p: p.read_bytes() for p in sorted(folder.glob("shard-*"))}
    assert len(shards) == 2
    for path in (list(shards)[1], folder / "record.json", folder / "manifest.json"):
        path.unlink()
    run_named("prepare", run, QUIET)
    assert {p: p.read_bytes() for p in sorted(folder.glob("shard-*"))} == shards


def test_draws_differ_by_seed_and_the_seed_is_part_of_what_the_samples_are(teacher: str, tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):
        how = {"max_new_tokens": 5, "temperature": 1.0, "seed": seed}
        run = run_of(teacher, tmp_path, answers=how, artifact=f"seed{seed}@1")
        run_named("prepare", run, QUIET)
        found.append(answers(run))
    assert found[0] != found[1]
    with pytest.raises(ArtifactDrift, match=r"answers\.seed"):
        run_named("prepare", run_of(teacher, tmp_path, answers={**how, "seed": 2}, artifact="seed0@1"), QUIET)


def test_a_question_without_room_for_an_answer_is_named(teacher: str, tmp_path: Path) -> None:
    long = {"id": "long", "conversations": [{"from": "human", "value": "x" * 300}]}
    with pytest.raises(SampleInvalid, match=r"record long: .* no room within max_length 256"):
        run_named("prepare", run_of(teacher, tmp_path, [*RECORDS, long]), QUIET)
    run = run_of(teacher, tmp_path, [*RECORDS, long], on_bad_sample="skip")
    run_named("prepare", run, QUIET)
    assert set(answers(run)) == {"one", "two", "three"}


def test_without_the_teachers_answers_a_record_must_have_its_own(teacher: str, tmp_path: Path) -> None:
    with pytest.raises(SampleInvalid, match="has no answer"):
        run_named("prepare", run_of(teacher, tmp_path, answers=None), QUIET)


def test_what_the_maximum_length_cuts_is_counted_and_said(teacher: str, tmp_path: Path) -> None:
    answered = [r for r in RECORDS if r["id"] == "two"]
    run_named("prepare", run_of(teacher, tmp_path, answered, answers=None, artifact="whole@1"), QUIET)
    whole = record_of(tmp_path, "whole")
    said = Console(file=io.StringIO(), width=200)
    run = run_of(teacher, tmp_path, answered, answers=None, max_length=whole["tokens"] - 3)
    run_named("prepare", run, said)
    found = record_of(tmp_path, "answers")
    # the last three: a line break behind the end mark, the end mark and the answer's last letter
    assert (found["truncated"], found["cut_tokens"], found["cut_response_tokens"]) == (1, 3, 2)
    assert found["response_tokens"] == whole["response_tokens"] - 2
    assert "1 samples were cut to prepare.max_length: 3 tokens, 2 of them of answers" in said.file.getvalue()  # type: ignore[attr-defined]


def record_of(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "store" / "prepare" / f"{name}@1" / "record.json").read_text())
    return found["result"]  # type: ignore[no-any-return]
