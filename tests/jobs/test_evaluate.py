"""Benchmarks, probes and the distribution through the stage ``evaluate``, in this process."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import jobs.evaluate
from jobs.cli import app
from jobs.stages import load_stage, open_store
from pipeline.benchmarks import gqa
from pipeline.benchmarks.asking import ask
from pipeline.benchmarks.exam import exams
from pipeline.benchmarks.tasks import read_items
from pipeline.data.encoding import Encoder
from pipeline.data.processors import load_processor
from pipeline.models import load_model
from pipeline.stage import require, run_stage
from schemas.benchmarks import BenchmarkConfig
from schemas.config import RunConfig
from schemas.errors import ArtifactDrift, SampleInvalid
from tests.conftest import tiny_settings
from tests.pipeline.benchmarks.layouts import write_json, write_lines
from tests.pipeline.test_training import make_cache

HERE = {"prepare": {"workers": 0}, "distill": {"workers": 0}, "evaluate": {"workers": 0, "batch": 4}}
QUESTIONS = 10


def write_gqa(folder: Path, scenes: Path, answers: list[str]) -> None:
    """The demo's pictures and questions in GQA's layout, with these labels."""
    records = json.loads((scenes / "test.json").read_text())[: len(answers)]
    (folder / "data" / "images").mkdir(parents=True)
    rows, labels = [], {}
    for number, (record, answer) in enumerate(zip(records, answers, strict=True)):
        name = f"n{number}.png"
        shutil.copy(scenes / record["image"], folder / "data" / "images" / name)
        text = record["conversations"][0]["value"].removeprefix("<image>\n")
        rows.append({"question_id": str(number), "image": name, "text": text, "category": "default"})
        labels[str(number)] = {
            "answer": answer,
            "imageId": f"n{number}",
            "question": text,
            "types": {"structural": "query"},
        }
    write_lines(folder / "llava_gqa_testdev_balanced.jsonl", rows)
    write_json(folder / "data" / "testdev_balanced_questions.json", labels)


@pytest.fixture(scope="module")
def benchmarks(scenes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of benchmarks; GQA's labels are what the scenes' records say."""
    folder = tmp_path_factory.mktemp("benchmarks")
    records = json.loads((scenes_folder / "test.json").read_text())[:QUESTIONS]
    write_gqa(folder / "gqa", scenes_folder, [r["conversations"][1]["value"].lower() for r in records])
    (folder / "mm-vet" / "images").mkdir(parents=True)
    shutil.copy(scenes_folder / records[0]["image"], folder / "mm-vet" / "images" / "0.png")
    write_lines(
        folder / "mm-vet" / "llava-mm-vet.jsonl",
        [{"question_id": 0, "image": "0.png", "text": "what is it ?", "category": "default"}],
    )
    return folder


@pytest.fixture(scope="module")
def evaluated(
    tiny_teacher: Path, scenes_folder: Path, benchmarks: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    """A finished run that asks all of it."""
    settings = tiny_settings(tiny_teacher, scenes_folder, tmp_path_factory.mktemp("store"))
    settings["evaluate"] |= {
        "limit": 4,
        "benchmarks": [{"task": "gqa", "path": str(benchmarks / "gqa")}],
        "probes": [{"kind": "copying", "lengths": [40, 60], "questions": 2}],
        "distribution": {},
    }
    settings["distill"]["validation"] = {"fraction": 0.3, "every": 100}
    run = RunConfig.model_validate({**settings, "placement": HERE})
    make_cache(run)
    for name in ("distill", "evaluate"):
        run_stage(open_store(run), load_stage(name, run))
    return run


def changed(run: RunConfig, **evaluate: Any) -> RunConfig:
    given = run.model_dump(mode="json")
    given["evaluate"] |= {"artifact": "second@1", **evaluate}
    return RunConfig.model_validate(given)


def answers_of(run: RunConfig) -> list[dict[str, str]]:
    text = open_store(run).read(f"{run.ref('evaluate')}/answers-gqa.jsonl")
    return [json.loads(line) for line in text.splitlines()]


def relabelled(benchmarks: Path, folder: Path, labels: dict[str, str]) -> dict[str, Any]:
    """GQA with other labels elsewhere, as a run file names it."""
    shutil.copytree(benchmarks / "gqa", folder)
    path = folder / "data" / gqa.QUESTIONS
    known = json.loads(path.read_text())
    write_json(path, {i: {**row, "answer": labels.get(i, row["answer"])} for i, row in known.items()})
    return {"task": "gqa", "path": str(folder)}


def test_record_has_figures_recoveries_and_distribution_and_files_the_answers(evaluated: RunConfig) -> None:
    store, ref = open_store(evaluated), evaluated.ref("evaluate")
    record = require(store, ref)
    result, lines = record.result, answers_of(evaluated)
    assert [line["id"] for line in lines] == [str(number) for number in range(QUESTIONS)]
    for who in ("teacher", "student"):
        submission = json.loads(store.read(f"{ref}/submissions/gqa/{who}/{gqa.PREDICTIONS}"))
        assert submission == [{"questionId": line["id"], "prediction": gqa.cleaned(line[who])} for line in lines]
        assert {"exact_match", "correct_prefix", "exact_match@40"} <= set(result[who]["tasks"]["copying"])
    assert "tasks" not in result["student_untrained"]
    assert set(result["recoveries"]) == {"gqa", "copying"}
    assert result["distribution"]["estimate"] == "unbiased"
    assert result["distribution"]["samples"] > 0
    assert "answers-gqa.jsonl" in record.files


def test_figures_are_the_share_of_answers_that_are_the_labels(
    evaluated: RunConfig, benchmarks: Path, tmp_path: Path
) -> None:
    """Labels are made of what the teacher said to six questions of ten, and of nothing that is ever said."""
    lines = answers_of(evaluated)
    labels = {line["id"]: gqa.cleaned(line["teacher"]) if n < 6 else "never" for n, line in enumerate(lines)}
    run = changed(evaluated, benchmarks=[relabelled(benchmarks, tmp_path / "gqa", labels)])
    result = run_stage(open_store(run), load_stage("evaluate", run))[0].result
    found = {who: result[who]["tasks"]["gqa"]["accuracy"] for who in ("teacher", "student")}
    alike = sum(gqa.cleaned(line["student"]) == gqa.cleaned(line["teacher"]) for line in lines[:6])
    assert (found["teacher"]["value"], found["teacher"]["scale"]) == (0.6, 1.0)
    assert found["student"]["value"] == alike / QUESTIONS
    assert result["recoveries"]["gqa"]["accuracy"]["value"] == pytest.approx(alike / 6)


def test_answers_are_those_to_each_question_alone(evaluated: RunConfig) -> None:
    processor = load_processor(evaluated.teacher)
    encoder = Encoder(processor, evaluated.prepare.max_length)
    exam = exams(evaluated.evaluate, encoder)[0]
    teacher = load_model(evaluated.teacher, torch.float32, torch.device("cpu"))
    alone = ask(teacher, processor, encoder, exam.task, exam.items, 1)
    assert [line["teacher"] for line in answers_of(evaluated)] == alone
    assert len(set(alone)) > 1


def test_other_students_take_the_teachers_answers_to_tasks_too(
    evaluated: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = jobs.evaluate.answer_as

    def never_the_teacher(job: Any, who: Any, tell: Any) -> Any:
        assert who != "teacher"
        return asked(job, who, tell)

    monkeypatch.setattr(jobs.evaluate, "answer_as", never_the_teacher)
    store, run = open_store(evaluated), changed(evaluated, teacher="tiny@1", artifact="third@1")
    second, _ = run_stage(store, load_stage("evaluate", run))
    assert second.result == require(store, evaluated.ref("evaluate")).result


def test_changed_labels_are_drift_and_a_changed_path_is_not(
    evaluated: RunConfig, benchmarks: Path, tmp_path: Path
) -> None:
    moved = changed(evaluated, benchmarks=[relabelled(benchmarks, tmp_path / "a", {})], artifact="tiny@1")
    assert run_stage(open_store(moved), load_stage("evaluate", moved))[1] is False
    other = relabelled(benchmarks, tmp_path / "b", {"0": "another"})
    drifted = changed(evaluated, benchmarks=[other], artifact="tiny@1")
    with pytest.raises(ArtifactDrift, match="benchmarks"):
        run_stage(open_store(drifted), load_stage("evaluate", drifted))


def test_missing_folder_is_told_before_any_work(evaluated: RunConfig) -> None:
    lost = changed(evaluated, benchmarks=[{"task": "pope", "path": "nowhere"}])
    with pytest.raises(SampleInvalid, match=r"evaluate\.benchmarks: pope: nowhere: is no folder"):
        load_stage("evaluate", lost)


def test_task_asked_twice_is_refused(evaluated: RunConfig) -> None:
    probe = {"kind": "copying", "lengths": [40]}
    with pytest.raises(ValueError, match="copying: more than once"):
        changed(evaluated, probes=[probe, probe])


def test_limit_draws_whole_pictures_from_all_parts(benchmarks: Path) -> None:
    config = BenchmarkConfig(task="gqa", path=str(benchmarks / "gqa"), limit=4)
    drawn = [item.id for item in read_items(config)]
    assert len(drawn) == 4
    assert drawn == sorted(drawn, key=int)
    assert drawn != ["0", "1", "2", "3"]
    whole = read_items(config.model_copy(update={"limit": QUESTIONS}))
    assert whole == gqa.TASK.read(benchmarks / "gqa")


def test_score_command_scores_answers_and_names_what_is_wrong_with_them(benchmarks: Path, tmp_path: Path) -> None:
    folder, answers = str(benchmarks / "gqa"), tmp_path / "answers.jsonl"
    items = gqa.TASK.read(benchmarks / "gqa")
    given = [{"id": item.id, "text": item.reference if number < 7 else ""} for number, item in enumerate(items)]
    write_lines(answers, given)
    out = CliRunner().invoke(app, ["score", "gqa", folder, str(answers), "--json", "--files", str(tmp_path / "out")])
    assert out.exit_code == 0, out.output
    assert json.loads(out.stdout)["figures"]["accuracy"]["value"] == 0.7
    assert (tmp_path / "out" / "testdev_balanced_predictions.json").exists()
    shown = CliRunner().invoke(app, ["score", "gqa", folder, str(answers)])
    assert "3 of 10 answers are empty" in shown.stdout
    write_lines(answers, given[1:])
    bad = CliRunner().invoke(app, ["score", "gqa", folder, str(answers)])
    assert bad.exit_code == 2
    assert "0: no answer (1 of 10 questions)" in bad.output
    unknown = CliRunner().invoke(app, ["score", "gqb", folder, str(answers)])
    assert "gqb: is no benchmark; there are mme" in unknown.output


def test_graders_file_is_written_where_labels_are_not_public(benchmarks: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "answers.jsonl", [{"question_id": 0, "text": "seven"}])
    arguments = ["score", "mmvet", str(benchmarks / "mm-vet"), str(tmp_path / "answers.jsonl"), "--files"]
    out = CliRunner().invoke(app, [*arguments, str(tmp_path / "out")])
    assert out.exit_code == 0, out.output
    assert "hold no labels" in out.stdout
    assert json.loads((tmp_path / "out" / "mm-vet.json").read_text()) == {"v1_0": "seven"}
