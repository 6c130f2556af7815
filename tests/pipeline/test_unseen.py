"""Which cached samples count as unseen by a student's training, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.stages import open_store
from pipeline.journal import Journal
from pipeline.stage import Stage, require, run_stage
from pipeline.store import Store
from pipeline.training.index import is_held_out
from schemas.artifacts import ArtifactRef
from schemas.config import RunConfig
from schemas.errors import ArtifactDrift, ArtifactMissing, ConfigInvalid
from tests.pipeline.restated import HELD_OUT, changed, measured, own_rows, settings_of
from tests.pipeline.test_training import make_cache, make_targets


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    """Matrices of 32 × 64 take longer on two threads, and twenty times as long where others want the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(tiny_teacher: Path, scenes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run with its cache."""
    found = RunConfig.model_validate(settings_of(tiny_teacher, scenes_folder, tmp_path_factory.mktemp("store")))
    make_cache(found)
    return found


def finished(store: Store, run: RunConfig) -> None:
    """The record of a training that made nothing."""

    def nothing(_: Store, __: str, ___: Journal) -> dict[str, Any]:
        return {}

    run_stage(store, Stage(run.ref("distill"), (), {}, nothing, run.model_dump(mode="json")))


def test_student_that_saw_every_sample_is_not_measured_on_them(run: RunConfig) -> None:
    store, recipe = open_store(run), run.distill.model_dump(mode="json")
    every = changed(run, distill={**recipe, "validation": {"fraction": 0.0}, "artifact": "every@1"})
    refusal = (
        r"fraction \(0\.0\) of distill/every@1.*holds out none of the 40 samples.*larger.*evaluate\.distribution\.cache"
    )
    with pytest.raises(ConfigInvalid, match=refusal):
        measured(every)
    tiny = changed(run, distill={**recipe, "validation": {"fraction": 1e-9}})
    with pytest.raises(ConfigInvalid, match=r"fraction \(1e-09"):
        measured(tiny)
    second = changed(run, student={**run.student.model_dump(), "start": "every@1"})
    with pytest.raises(ArtifactMissing, match="decant distill"):
        measured(second)
    finished(store, every)
    with pytest.raises(ConfigInvalid, match=r"fraction \(0\.0\) of distill/every@1"):
        measured(second)
    half = changed(run, distill={**recipe, "validation": {"fraction": HELD_OUT / 2}, "artifact": "half@1"})
    finished(store, half)
    third = changed(run, student={**run.student.model_dump(), "start": "half@1"})
    left = [row for row in own_rows(run) if is_held_out(row["sample_id"], HELD_OUT / 2)]
    assert 0 < measured(third)["samples"] == len(left) < len(own_rows(run))


def test_cache_of_other_samples_is_measured_on_but_for_those_that_training_saw(
    run: RunConfig, scenes_folder: Path, tmp_path: Path
) -> None:
    known = json.loads((scenes_folder / "train.json").read_text())
    new = json.loads((scenes_folder / "test.json").read_text())
    (tmp_path / "mixed.json").write_text(json.dumps([*new, *known]))
    prepare = {**run.prepare.model_dump(), "data": str(tmp_path / "mixed.json"), "artifact": "mixed@1"}
    other = changed(run, prepare=prepare, cache={"artifact": "mixed@1", "taps": {"fraction": 0.0}})
    make_cache(other)
    found = measured(run, cache="mixed@1")
    assert found["cache"] == "cache/mixed@1"
    assert found["samples"] == len(new) + len(own_rows(run))
    assert "no taps of the replaced layers [1, 3]" in found["notes"]["layers"]
    recipe = run.distill.model_dump(mode="json")
    every = changed(run, distill={**recipe, "validation": {"fraction": 0.0}})
    assert measured(every, cache="mixed@1")["samples"] == len(new)
    assert measured(run, cache="tiny@1") == measured(run)
    make_targets(changed(run, cache={**run.cache.model_dump(mode="json"), "artifact": "again@1"}))
    with pytest.raises(ConfigInvalid, match=r"trained on all 40 samples of prepare/tiny@1.*other samples"):
        measured(every, cache="again@1")
    with pytest.raises(ArtifactMissing, match="decant cache"):
        measured(run, cache="nowhere@1")


def test_cache_of_another_teacher_or_of_samples_made_anew_is_refused(run: RunConfig) -> None:
    store, ref = open_store(run), ArtifactRef.named("cache", "altered@1")
    record = require(store, run.ref("cache"))

    def alter(**identity: Any) -> None:
        made = record.model_copy(update={"ref": str(ref), "identity": {**record.identity, **identity}}).sealed()
        store.write(ref.record_path, made.model_dump_json().encode())

    settings = record.identity["settings"]
    alter(settings={**settings, "teacher": {**settings["teacher"], "weights": "0" * 32}})
    with pytest.raises(ConfigInvalid, match=r"distribution\.cache: .*altered@1: is of another teacher"):
        measured(run, cache="altered@1")
    alter(inputs=dict.fromkeys(record.identity["inputs"], "0" * 32))
    with pytest.raises(ArtifactDrift, match=r"prepare/tiny@1: was made anew since cache/altered@1"):
        measured(run, cache="altered@1")
