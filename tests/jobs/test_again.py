"""A stage run again: nothing where it is finished, above all no teacher; a refusal where something differs."""

import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import jobs.cache
import jobs.prepare
import pipeline.capture
from jobs.stages import load_stage, open_store, run_named, teacher_digests
from pipeline.stage import run_stage, status
from schemas.config import RunConfig
from schemas.errors import ArtifactDrift
from schemas.tables import Table
from tests.conftest import tiny_model
from tests.pipeline.test_training import make_cache


@dataclass
class Made:
    """A run with a teacher folder of its own, whose first two stages count as finished."""

    teacher: Path
    settings: dict[str, Any]
    patch: pytest.MonkeyPatch

    @property
    def run(self) -> RunConfig:
        return RunConfig.model_validate(self.settings)

    def edit(self, name: str, *path: str, value: Any) -> None:
        """Changes one entry of a JSON file of the teacher's."""
        found = inner = json.loads((self.teacher / name).read_text())
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        (self.teacher / name).write_text(json.dumps(found))

    def append(self, name: str) -> None:
        """Adds an empty line to a file of the teacher's."""
        with (self.teacher / name).open("a") as file:
            file.write("\n")

    def other_data(self) -> None:
        """One record fewer."""
        records = json.loads(Path(self.settings["prepare"]["data"]).read_text())
        data = self.teacher / "data.other"
        data.write_text(json.dumps(records[1:]))
        self.settings["prepare"]["data"] = str(data)

    def other_table(self, module: Any, name: str) -> None:
        """The next version of the table that a module makes or has under a name."""
        old = getattr(module, name)
        new = next_version(old) if isinstance(old, Table) else lambda *arguments: next_version(old(*arguments))
        self.patch.setattr(module, name, new)


def next_version(table: Table) -> Table:
    return dataclasses.replace(table, version=table.version + 1)


TOKENIZER, TEMPLATE, IMAGES = "tokenizer.json", "chat_template.jinja", "processor_config.json"
CONVERSION = (IMAGES, "image_processor", "do_convert_rgb")
# What changes, and how the refusal of `prepare` and of `cache` names it.
PREPARED: dict[str, tuple[Callable[[Made], None], str]] = {
    "data": (Made.other_data, "settings.data: "),
    "tokenizer": (lambda made: made.append(TOKENIZER), f"settings.processor.{TOKENIZER}: "),
    "chat template": (lambda made: made.append(TEMPLATE), f"settings.processor.{TEMPLATE}: "),
    "image processor": (lambda made: made.edit(*CONVERSION, value=False), f"settings.processor.{IMAGES}: "),
    "length": (lambda made: made.settings["prepare"].update(max_length=64), "settings.max_length: 128 -> 64"),
    "table": (lambda made: made.other_table(jobs.prepare, "SAMPLES"), 'settings.table: "samples@2" -> "samples@3"'),
}
CACHED: dict[str, tuple[Callable[[Made], None], str]] = {
    "weights": (lambda made: tiny_model(seed=1).save_pretrained(made.teacher), "settings.teacher.weights: "),
    "configuration": (
        lambda made: made.edit("config.json", "text_config", "layer_norm_eps", value=1e-3),
        "settings.teacher.config.json: ",
    ),
    "tokenizer": (lambda made: made.append(TOKENIZER), f"settings.teacher.{TOKENIZER}: "),
    "chat template": (lambda made: made.append(TEMPLATE), f"settings.teacher.{TEMPLATE}: "),
    "image processor": (lambda made: made.edit(*CONVERSION, value=False), f"settings.teacher.{IMAGES}: "),
    "seed": (lambda made: made.settings["cache"].update(seed=1), "settings.seed: 0 -> 1"),
    "draws": (
        lambda made: made.settings["cache"].update(targets={"kind": "sampled", "draws": 49}),
        "settings.targets.draws: 50 -> 49",
    ),
    "table": (
        lambda made: made.other_table(jobs.cache, "targets_table"),
        'settings.table: "targets@2" -> "targets@3"',
    ),
}
CASES = [("prepare", what, *case) for what, case in PREPARED.items()]
CASES += [("cache", what, *case) for what, case in CACHED.items()]


@pytest.fixture
def made(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Made]:
    shutil.copytree(settings["teacher"]["path"], tmp_path / "teacher")
    settings["teacher"] = {"path": str(tmp_path / "teacher")}
    found = Made(tmp_path / "teacher", settings, monkeypatch)
    for name in ("prepare", "cache"):
        stage = load_stage(name, found.run)
        run_stage(open_store(found.run), dataclasses.replace(stage, run=lambda *_: {}))
        assert status(open_store(found.run), stage) == "done"
    yield found
    teacher_digests.cache_clear()


@pytest.mark.parametrize(("name", "what", "change", "says"), CASES, ids=[f"{name}-{what}" for name, what, *_ in CASES])
def test_what_was_made_otherwise_is_refused_and_the_very_field_named(
    made: Made, name: str, what: str, change: Callable[[Made], None], says: str
) -> None:
    change(made)
    teacher_digests.cache_clear()  # a later command is another process and reads the files anew
    with pytest.raises(ArtifactDrift) as caught:
        run_named(name, made.run, Console(file=io.StringIO()))
    first, *differing, last = str(caught.value).splitlines()
    assert f"{name}/tiny@1: was made from other settings" in first
    assert len(differing) == 1, differing
    assert differing[0].startswith(f"  {says}")
    assert f"{name}.artifact" in last


def test_second_run_of_a_finished_cache_makes_no_teacher(
    run_of: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = run_of(), io.StringIO()
    store = make_cache(run)
    record = store.read(run.ref("cache").record_path)

    def raises(*_: object) -> None:
        raise AssertionError("a teacher was made")

    monkeypatch.setattr(pipeline.capture.Teacher, "__init__", raises)
    monkeypatch.setattr(jobs.cache, "session", raises)
    run_named("cache", run, Console(file=out, width=200))
    assert "cache/tiny@1 is already done" in out.getvalue()
    assert store.read(run.ref("cache").record_path) == record
    store.remove(run.ref("cache").record_path)
    run_named("cache", run, Console(file=out, width=200))
    assert json.loads(store.read(run.ref("cache").record_path))["result"]["computed_shards"] == 0
    store.remove(f"{run.ref('cache')}/shard-000003.parquet")
    store.remove(run.ref("cache").record_path)
    for again in (make_cache, lambda r: run_named("cache", r, Console(file=out))):
        with pytest.raises(AssertionError, match="a teacher was made"):
            again(run)
