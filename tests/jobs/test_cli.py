import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import typer
import yaml
from click.testing import Result
from transformers import Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.student import load_hybrid
from tests.decoders import COMMON, build, image_prompt, tokens
from tests.pipeline.test_student import matvlm_folder

GOLDEN = Path("tests/golden/options.txt")


def decant(*arguments: str) -> Result:
    """The command's exit code and output, in this process."""
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def options() -> str:
    lines = []
    known = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    known |= {f"jobs {name}": command for name, command in known.pop("jobs").commands.items()}
    for name, command in sorted(known.items()):
        shown = [
            " / ".join(p.opts) + (f" {p.metavar}" if p.metavar else "") for p in command.params if p.name != "help"
        ]
        lines.append(f"{name}: {', '.join(shown)}")
    return "\n".join(lines) + "\n"


def test_command_line_options_are_the_golden_file() -> None:
    assert options() == GOLDEN.read_text()


def test_help_and_configuration_check_import_no_framework() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; import jobs.cli, schemas.runfile;"
        "assert CliRunner().invoke(jobs.cli.app, ['--help']).exit_code == 0;"
        "schemas.runfile.load_run('jobs/configs/demo.yaml');"
        "print(sorted({'torch', 'ray', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def refused(done: Result, *says: str) -> None:
    assert done.exit_code == 2, done.stdout + done.stderr
    assert isinstance(done.exception, SystemExit)
    text = re.sub(r"\s+", " ", done.stderr)
    for part in says:
        assert part in text


def committed(store: str) -> list[str]:
    return [p.name for p in Path(store).rglob("*") if p.is_file()]


def test_unknown_key_is_refused(run_file: Path, settings: dict[str, Any]) -> None:
    run_file.write_text(yaml.safe_dump({**settings, "studnet": {}}))
    refused(decant("prepare", str(run_file)), "ConfigInvalid", str(run_file), "studnet: unknown field", "student")
    assert committed(settings["store"]) == []


def test_ratio_that_replaces_no_layer_is_refused(run_file: Path, settings: dict[str, Any]) -> None:
    done = decant("cache", str(run_file), "--set", "student.layers.ratio=0.05")
    refused(done, "student.layers.ratio: 0.05 of 4 decoder layers replaces no layer", "0.25")
    assert committed(settings["store"]) == []


def test_missing_input_names_the_command(run_file: Path) -> None:
    refused(decant("cache", str(run_file)), "ArtifactMissing", "prepare/tiny@1", "decant prepare RUN.yaml")


def broken_data(settings: dict[str, Any], folder: Path, kind: str) -> str:
    records = json.loads(Path(settings["prepare"]["data"]).read_text())
    if kind == "image missing":
        records[5]["image"] = "images/train/none.png"
    elif kind == "image broken":
        records[5]["image"] = Path(settings["prepare"]["data"]).name
    elif kind == "no answer":
        records[5]["conversations"] = records[5]["conversations"][:1]
    elif kind == "empty":
        records = []
    path = folder / "broken.json"
    path.write_text(json.dumps(records))
    return str(path)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("image missing", ["record train-000005: image:", "none.png: No such file"]),
        ("image broken", ["record train-000005: image:", "train.json: cannot be decoded"]),
        ("no answer", ["record 5 (id train-000005): conversations: the conversation has no answer"]),
        ("empty", ["the data set is empty"]),
    ],
)
def test_bad_data_is_named_and_leaves_no_artifact(
    run_file: Path, settings: dict[str, Any], tmp_path: Path, kind: str, says: list[str]
) -> None:
    data = broken_data(settings, tmp_path, kind)
    refused(decant("prepare", str(run_file), "--set", f"prepare.data={data}"), "SampleInvalid", data, *says)
    assert committed(settings["store"]) == []
    mended = decant("prepare", str(run_file))
    assert mended.exit_code == 0, mended.stderr


def test_unwritable_run_folder_is_named(run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = str(tmp_path / "file" / "store")
    refused(decant("prepare", str(run_file), "--set", f"store={store}"), "StoreUnavailable", store, "is writable")


def test_dry_run_writes_nothing_and_shows_the_resolved_run(run_file: Path, settings: dict[str, Any]) -> None:
    done = decant("prepare", str(run_file), "--dry-run", "--set", "cache.seed=7")
    assert done.exit_code == 0, done.stderr
    shown = yaml.safe_load(done.stdout)
    assert shown["cache"]["seed"] == 7
    assert shown["distill"]["clip"] == 0.1
    assert "prepare/tiny@1 would be made" in done.stdout
    assert not Path(settings["store"]).exists()


def test_second_run_says_that_nothing_is_to_be_done_and_drift_names_the_field(run_file: Path) -> None:
    first = decant("prepare", str(run_file))
    assert first.exit_code == 0, first.stderr
    assert "prepare/tiny@1 done in" in first.stdout
    assert "is already done" in decant("prepare", str(run_file)).stdout
    drift = decant("prepare", str(run_file), "--set", "prepare.shard_rows=8")
    refused(drift, "ArtifactDrift", "settings.shard_rows: 4 -> 8", "tiny@2")
    shown = decant("inspect", str(run_file)).stdout
    assert re.search(r"● prepare/tiny@1 +done +40 +10 ", shown)
    assert re.search(r"● cache/tiny@1 +not made", shown)


def test_demo_refuses_a_bad_setting_before_it_draws_anything(run_file: Path, tmp_path: Path) -> None:
    data = tmp_path / "data" / "train.json"
    done = decant("demo", str(run_file), "--set", "student.layers.ratio=0.05", "--set", f"prepare.data={data}")
    refused(done, "replaces no layer")
    assert not data.parent.exists()


def test_layer_that_cannot_be_replaced_is_refused_before_the_teacher_runs(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    windows = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
    Qwen3ForCausalLM(Qwen3Config(**COMMON, use_sliding_window=True, **windows)).save_pretrained(tmp_path / "qwen3")
    settings |= {"teacher": {"path": str(tmp_path / "qwen3")}, "student": {"layers": {"list": [0, 1]}}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    for stage in ("cache", "distill"):
        refused(
            decant(stage, str(path)), "layer 0 (Qwen3Attention sees the last 16", "Layers that can be replaced: [1, 3]"
        )
    assert committed(settings["store"]) == []


def test_matvlm_checkpoint_becomes_an_exported_folder(tmp_path: Path) -> None:
    build("llava").save_pretrained(tmp_path / "teacher")
    theirs = matvlm_folder(tmp_path / "matvlm", (0, 2))
    arguments = [str(tmp_path / name) for name in ("matvlm", "teacher", "hybrid")]
    done = decant("import-matvlm", *arguments)
    assert done.exit_code == 0, done.output
    assert "layers [0, 2] are Mamba-2 mixers" in done.output
    inputs = image_prompt("llava", tokens(6)[0])
    assert torch.equal(load_hybrid(tmp_path / "hybrid")(**inputs).logits, theirs(**inputs).logits)
    refused(decant("import-matvlm", *arguments), "exists already")
    arguments[0], arguments[2] = arguments[1], str(tmp_path / "other")
    refused(decant("import-matvlm", *arguments), "is no MaTVLM checkpoint")
    arguments[1] = str(tmp_path / "nowhere")
    refused(decant("import-matvlm", str(tmp_path / "matvlm"), *arguments[1:]), "nowhere: is not a transformers folder")
    assert not list(tmp_path.glob(".import-*"))
    assert not (tmp_path / "other").exists()


def test_skipped_records_are_counted_and_named_in_the_rejects_table(settings: dict[str, Any], tmp_path: Path) -> None:
    data = Path(settings["prepare"]["data"])
    records = json.loads(data.read_text())[:6]
    records[1]["image"], records[4]["conversations"] = "nowhere.png", []
    (tmp_path / "some.json").write_text(json.dumps([*records, records[0]]))
    settings["prepare"] |= {"data": str(tmp_path / "some.json"), "images": str(data.parent)}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    refused(decant("prepare", str(path)), "image", "nowhere.png: No such file")
    assert committed(settings["store"]) == []
    done = decant("prepare", str(path), "--set", "prepare.on_bad_sample=skip")
    assert done.exit_code == 0, done.output
    assert "2 records were skipped" in done.output
    assert "1 samples are in the data more than once" in done.output
    folder = Path(settings["store"]) / "prepare/tiny@1"
    rejects = pq.read_table(folder / "rejects.parquet").to_pylist()
    assert [(r["file"], r["record"]) for r in rejects] == [(str(tmp_path / "some.json"), n) for n in (1, 4)]
    assert "nowhere.png" in rejects[0]["reason"]
    assert "list of turns" in rejects[1]["reason"]
    result = json.loads((folder / "record.json").read_text())["result"]
    assert (result["samples"], result["rejected"], result["duplicates"]) == (5, 2, 1)
    (tmp_path / "some.json").write_text(json.dumps([records[4]]))
    settings["prepare"]["artifact"] = "none@1"
    path.write_text(yaml.safe_dump(settings))
    refused(decant("prepare", str(path), "--set", "prepare.on_bad_sample=skip"), "none of 1 records can be used")


def test_stages_do_not_import_ray_before_their_session_has_set_its_switches(
    run_file: Path, settings: dict[str, Any]
) -> None:
    settings["placement"] = {}
    run_file.write_text(yaml.safe_dump(settings))
    code = f"""
import sys
from contextlib import contextmanager
from pathlib import Path
import jobs.prepare
from jobs.stages import load_stage, open_store
from pipeline.stage import run_stage
from schemas.runfile import load_run

@contextmanager
def session():
    sys.exit("ray was imported" if "ray" in sys.modules else "not yet")
    yield

run = load_run({str(run_file)!r})
for name in ("cache", "distill", "evaluate"):
    load_stage(name, run)
jobs.prepare.session = session
run_stage(open_store(run), load_stage("prepare", run))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip().endswith("not yet"), done.stderr
