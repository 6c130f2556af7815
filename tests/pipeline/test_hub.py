"""Teachers by their names on the hub, which is here a server of the test's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.models import load_config
from schemas.config import TeacherConfig
from schemas.errors import ConfigInvalid
from tests.hub import COMMIT, serving
from tests.teachers import write_teacher

NAME = "someone/tiny-llava"
# The frameworks, which take seconds to import, come after what the hub refuses.
LOAD = """
import sys
from pathlib import Path
from pipeline.hub import folder_of, pinned
from schemas.config import TeacherConfig
trust = "trust" in sys.argv
teacher = pinned(TeacherConfig(path=sys.argv[1], revision=sys.argv[2] or None, trust_remote_code=trust))
import torch
from pipeline.data.processors import load_processor
from pipeline.models import load_model
print(teacher.revision, type(load_model(teacher, torch.float32, torch.device("cpu"))).__name__)
print(len(load_processor(teacher).tokenizer), *sorted(p.name for p in Path(folder_of(teacher)).iterdir()))
"""
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class TinyConfig(LlamaConfig):
    model_type = "tiny_of_someone"

class TinyForCausalLM(LlamaForCausalLM):
    config_class = TinyConfig
"""


def load(
    home: Path, endpoint: str, name: str = NAME, revision: str = "", *more: str
) -> subprocess.CompletedProcess[str]:
    """What a fresh process makes of the name; its cache of downloads is in ``home``."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, name, revision, *more],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": str(Path.cwd()),
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        },
    )


def test_a_teacher_by_name_is_fetched_once_without_code_and_without_pickle(tmp_path: Path) -> None:
    folder = write_teacher("llava-1.5", tmp_path / "teacher")
    for unsafe in ("modeling_tiny.py", "pytorch_model.bin", "weights.pt"):
        (folder / unsafe).write_bytes(b"never read")
    home = tmp_path / "home"
    with serving(NAME, folder) as (endpoint, asked):
        first = load(home, endpoint)
        assert first.returncode == 0, first.stderr
        assert f"{COMMIT} LlavaForConditionalGeneration" in first.stdout
        fetched = [a for a in asked if a.startswith("GET") and "/resolve/" in a]
        assert any("model.safetensors" in a for a in fetched)
        assert not [a for a in asked if any(a.endswith(e) for e in (".py", ".bin", ".pt"))]
        del asked[:]
        again = load(home, endpoint, revision=COMMIT)
        assert again.stdout == first.stdout
        assert not [a for a in asked if a.startswith("GET") and "/resolve/" in a], "the files are here already"
    gone = load(home, endpoint, revision=COMMIT)
    assert gone.stdout == first.stdout, "a teacher that is here needs no hub"


@pytest.mark.parametrize(
    ("name", "revision", "says"),
    [
        ("someone/other", "", "no such folder here and no such repository on the hub"),
        (NAME, "v9", "at revision v9: the hub has no such revision"),
    ],
)
def test_what_the_hub_has_not_is_named(tmp_path: Path, name: str, revision: str, says: str) -> None:
    with serving(NAME, write_teacher("llama", tmp_path / "teacher")) as (endpoint, _):
        found = load(tmp_path / "home", endpoint, name, revision)
    assert f"ConfigInvalid: teacher.path: {name}" in found.stderr
    assert says in found.stderr


def test_a_hub_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    found = load(tmp_path / "home", "http://127.0.0.1:9")
    assert "is not on this machine, and the hub cannot be reached" in found.stderr


def test_a_repositorys_code_runs_only_where_the_run_file_trusts_a_commit(tmp_path: Path) -> None:
    folder = write_teacher("llama", tmp_path / "teacher")
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}
    config |= {"model_type": "tiny_of_someone", "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (folder / "modeling_tiny.py").write_text(f"open({str(ran)!r}, 'w').close()\n{CODE}")
    with serving(NAME, folder) as (endpoint, _):
        refused = load(tmp_path / "home", endpoint, NAME, COMMIT)
        assert "its model class is Python code in the repository; to run that, give teacher.revision" in refused.stderr
        assert not ran.exists()
        trusted = load(tmp_path / "home", endpoint, NAME, COMMIT, "trust")
    assert f"{COMMIT} TinyForCausalLM" in trusted.stdout, trusted.stderr
    assert ran.exists()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, "is not a transformers folder"),
        ("{", "config.json cannot be read"),
        ('{"model_type": "tinyllava"}', "`decant import-teacher .* FOLDER` makes a teacher of it"),
        ('{"model_type": "of nobody"}', "config.json cannot be used: .*of nobody"),
        ('{"model_type": "decant_hybrid"}', "is an exported student, which is no teacher"),
    ],
)
def test_a_folder_that_is_no_teachers_is_named(tmp_path: Path, config: str | None, says: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigInvalid, match=says) as caught:
        load_config(tmp_path)
    assert f"teacher.path: {tmp_path}: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_remote_code_needs_a_commit() -> None:
    with pytest.raises(ValueError, match=r"trust_remote_code needs `revision` to be a commit"):
        TeacherConfig(path=NAME, revision="main", trust_remote_code=True)
    assert TeacherConfig(path=NAME, revision=COMMIT, trust_remote_code=True).trust_remote_code
