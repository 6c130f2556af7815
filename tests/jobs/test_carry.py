import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import carry
from jobs.carry import RUN_FILE, pack, paths_of
from schemas.config import RunConfig
from schemas.errors import ConfigInvalid
from schemas.runfile import load_run

S3 = "s3://bucket/decant"


@pytest.fixture
def here(tmp_path: Path, tiny_teacher: Path, scenes_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with teacher and data below it."""
    folder = tmp_path / "here"
    shutil.copytree(tiny_teacher, folder / "teacher")
    shutil.copytree(scenes_folder, folder / "data" / "scenes")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def relative(here: Path, run_of: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    """A run that names its files by relative paths."""

    def make(**sections: Any) -> RunConfig:
        data = {"data": "data/scenes/train.json", "images": "data/scenes"}
        named: dict[str, Any] = {"store": S3, "teacher": {"path": "teacher"}, "prepare": data, "evaluate": data}
        return run_of(**{**named, **sections})

    return make


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_what_travels_is_the_resolved_run_the_code_and_what_the_stages_read(
    relative: Callable[..., RunConfig], here: Path, tmp_path: Path
) -> None:
    run, sent = relative(), tmp_path / "sent"
    pack(run, ["prepare", "cache"], "upload", sent)
    assert load_run(sent / RUN_FILE) == run
    ours = files(here)
    assert files(sent) >= {*ours, "jobs/cli.py", "pipeline/report/report.html.j2", "jobs/configs/demo.yaml"}
    assert all((sent / name).read_bytes() == (here / name).read_bytes() for name in ours)
    # neither byte code nor the demo's weights, which travel where they are the teacher
    assert not [name for name in files(sent) if "__pycache__" in name or name.startswith("jobs/demo/teacher/model")]


def test_with_installed_code_and_a_stage_without_data_next_to_nothing_travels(
    relative: Callable[..., RunConfig], tmp_path: Path
) -> None:
    sent = tmp_path / "sent"
    sent.mkdir()
    pack(relative(), ["cache"], "installed", sent)
    assert {name.partition("/")[0] for name in files(sent)} == {RUN_FILE, "teacher"}


def test_benchmarks_folders_travel_with_evaluate(
    relative: Callable[..., RunConfig], here: Path, tmp_path: Path
) -> None:
    (here / "gqa").mkdir()
    (here / "gqa" / "questions.jsonl").write_text("{}")
    data = {"data": "data/scenes/test.json", "images": "data/scenes"}
    run = relative(
        evaluate={**data, "benchmarks": [{"task": "gqa", "path": "gqa"}, {"task": "mme", "path": "/shared"}]}
    )
    for stage, travels in (("evaluate", True), ("cache", False)):
        sent = tmp_path / stage
        sent.mkdir()
        pack(run, [stage], "installed", sent)
        assert (sent / "gqa" / "questions.jsonl").exists() == travels
    assert paths_of(run, ["evaluate"])["evaluate.benchmarks.1.path"] == "/shared"


def test_names_urls_and_absolute_paths_do_not_travel(
    relative: Callable[..., RunConfig], tiny_teacher: Path, tmp_path: Path
) -> None:
    data = {"data": "s3://bucket/train.json", "images": "/shared/images"}
    for teacher in ("llava-hf/llava-1.5-7b-hf", str(tiny_teacher)):
        sent = tmp_path / teacher.replace("/", "-")
        sent.mkdir()
        pack(relative(teacher={"path": teacher}, prepare=data), ["prepare"], "installed", sent)
        assert files(sent) == {RUN_FILE}


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"store": "runs/mine"}, "store: runs/mine is a folder of this machine; .* URL .* absolute path"),
        ({"prepare": {"data": "nowhere.json"}}, "prepare.data: nowhere.json: no such file"),
        ({"prepare": {"data": "../secret.json"}}, "prepare.data: ../secret.json is not below the working directory"),
    ],
)
def test_what_cannot_travel_is_refused(
    relative: Callable[..., RunConfig], here: Path, tmp_path: Path, sections: dict[str, Any], says: str
) -> None:
    (here.parent / "secret.json").touch()
    with pytest.raises(ConfigInvalid, match=says):
        pack(relative(**sections), ["prepare"], "upload", tmp_path / "sent")


def test_too_much_to_travel_is_refused_before_it_is_copied(
    relative: Callable[..., RunConfig], here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carry, "LARGEST", 2**20)
    for i in range(8):
        (here / "data" / "scenes" / f"{i}.bin").write_bytes(bytes(2**20))
    sent = tmp_path / "sent"
    with pytest.raises(ConfigInvalid, match=r"prepare\.images: with data/scenes more than 1 MiB would travel.* URL"):
        pack(relative(), ["prepare"], "upload", sent)
    assert sum(p.stat().st_size for p in (sent / "data").rglob("*.bin")) <= 2 * 2**20
