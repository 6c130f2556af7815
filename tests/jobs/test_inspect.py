"""``decant inspect`` from the command line: lists, describes, draws and audits; a wrong shard is found and named."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from jobs import cache
from pipeline.shards import fold_manifest, read_manifest, uncommitted
from pipeline.stage import file_digests, read_record, record_bytes, require
from pipeline.store import Store
from schemas.config import RunConfig, StoreConfig
from schemas.tables import targets_table
from tests.conftest import tiny_model, tiny_settings
from tests.jobs.test_cli import decant, refused
from tests.pipeline.test_training import make_cache

TARGETS: dict[str, dict[str, Any]] = {
    "sampled": {"taps": {"fraction": 0.5}},
    "top_k": {"targets": {"kind": "top_k", "k": 5}, "positions": "text", "taps": {"fraction": 0}},
    "final_hidden": {
        "targets": {"kind": "final_hidden", "dtype": "fp8_e4m3"},
        "taps": {"fraction": 0.5, "dtype": "fp8_e4m3", "targets": "recompute"},
    },
    "bfloat16": {"dtype": "bfloat16", "taps": {"fraction": 0.5}},
}
each_kind = pytest.mark.parametrize("made", TARGETS, indirect=True)
one_kind = pytest.mark.parametrize("made", ["sampled"], indirect=True)


@pytest.fixture(scope="module")
def made(request: pytest.FixtureRequest, tiny_teacher: Path, scenes_folder: Path, tmp_path_factory: Any) -> RunConfig:
    """A finished cache of one kind of target."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = tiny_settings(tiny_teacher, scenes_folder, folder / "store") | {"cache": TARGETS[request.param]}
    run = RunConfig.model_validate(settings)
    make_cache(run)
    return run


@pytest.fixture
def own(made: RunConfig, tmp_path: Path) -> RunConfig:
    """A copy that the test may spoil."""
    shutil.copytree(made.store.url, tmp_path / "copy")
    return made.model_copy(update={"store": StoreConfig(url=str(tmp_path / "copy"))})


def file_of(run: RunConfig, folder: Path) -> str:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    return str(path)


def rewrite(run: RunConfig, index: int) -> None:
    """Commits one shard of another teacher's values, with every digest and seal as they must be."""
    store, ref = Store(run.store.url), run.ref("cache")
    record = require(store, ref)
    actor = cache.TeacherActor(cache.cache_job(run, record.fingerprint))
    actor.teacher.model = tiny_model(seed=1)
    actor(cache.decode_shard(pa.table({"shard": [index]}), actor.job))
    table = targets_table(actor.job.config, actor.job.tapped)
    fold_manifest(store, ref, table, len(read_manifest(store, run.ref("prepare")).shards), record.fingerprint)
    again = record.model_copy(update={"files": file_digests(store, ref)}).sealed()
    store.write(ref.record_path, record_bytes(again))


@pytest.mark.parametrize("batch", [1, 7, 64])
@each_kind
def test_untouched_cache_passes_its_audit_in_any_batch(made: RunConfig, tmp_path: Path, batch: int) -> None:
    done = decant("inspect", file_of(made, tmp_path), "--audit", "1", "--set", f"placement.cache.batch={batch}")
    assert done.exit_code == 0, done.stderr
    assert "40 of 40 rows are audited, in 10 shards" in done.stdout
    assert "cache/tiny@1: these rows are what its teacher gives" in done.stdout
    fields = {
        "sampled": {"ids, counts", "tap_0_input", "tap_0_output"},
        "top_k": {"ids, logprobs"},
        "final_hidden": {"hidden", "tap_0_input"},
    }[made.cache.targets.kind] | {"lse", "gold_logprob", "entropy"}
    assert set(re.findall(r"^(\w[\w, ]*?) +\d+ +[\d.]+ %", done.stdout, re.M)) == fields


@each_kind
def test_wrong_shard_under_right_digests_is_named_and_repair_drops_just_it(own: RunConfig, tmp_path: Path) -> None:
    rewrite(own, 3)
    store, ref, run = Store(own.store.url), own.ref("cache"), file_of(own, tmp_path)
    assert decant("inspect", run, "--verify").exit_code == 0, "its digests are right"
    done = decant("inspect", run, "--audit", "1")
    refused(
        done,
        "1 of 10 audited shards are not what the teacher gives",
        store.path(f"{ref}/shard-000003.parquet"),
        "--repair",
    )
    sample = read_samples(own, 3)[0]
    assert re.search(rf"shard-000003\.parquet: {sample}: \w+: expected [-\d.]+ at position \d+, got", done.stderr)
    assert not re.search(r"shard-00000[^3]\.parquet", done.stderr)
    assert read_record(store, ref) is not None
    assert decant("inspect", run, "--audit", "1", "--repair", "--dry-run").exit_code == 0
    refused(decant("inspect", run, "--audit", "1", "--repair"), "shard-000003.parquet")
    assert read_record(store, ref) is None
    assert uncommitted(store, ref, 10) == [3]
    make_cache(own)
    assert decant("inspect", run, "--verify", "--audit", "1").exit_code == 0


def read_samples(run: RunConfig, index: int) -> list[str]:
    path = Store(run.store.url).path(f"{run.ref('prepare')}/shard-{index:06d}.parquet")
    return pq.read_table(path, columns=["sample_id"])["sample_id"].to_pylist()


@one_kind
def test_unreadable_shard_is_named_with_the_wrong_one(own: RunConfig, tmp_path: Path) -> None:
    rewrite(own, 3)
    broken = Path(own.store.url) / str(own.ref("cache")) / "shard-000007.parquet"
    broken.write_bytes(b"broken")
    done = decant("inspect", file_of(own, tmp_path), "--audit", "1", "--repair")
    refused(done, "2 of 10 audited shards are not what the teacher gives", "shard-000003.parquet", str(broken))
    assert uncommitted(Store(own.store.url), own.ref("cache"), 10) == [3, 7]


@one_kind
def test_another_teacher_is_refused_by_what_differs(made: RunConfig, tiny_teacher: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_teacher, other)
    tiny_model(seed=1).save_pretrained(other)
    run = file_of(made, tmp_path)
    done = decant("inspect", run, "--audit", "1", "--set", f"teacher.path={other}")
    refused(done, "ArtifactDrift", f"{other}: is not the teacher that made", "weights: ", str(tiny_teacher))
    assert "processor:" not in done.stderr


@one_kind
def test_samples_made_anew_are_refused(own: RunConfig, tmp_path: Path) -> None:
    store = Store(own.store.url)
    record = require(store, own.ref("prepare"))
    store.write(own.ref("prepare").record_path, record_bytes(record.model_copy(update={"fingerprint": "0"}).sealed()))
    refused(decant("inspect", file_of(own, tmp_path), "--audit", "1"), "was made from samples with fingerprint")


@one_kind
def test_smallest_fraction_audits_one_row_and_says_so(made: RunConfig, tmp_path: Path) -> None:
    done = decant("inspect", file_of(made, tmp_path), "--audit", "0", "--dry-run")
    assert "1 of 40 rows are audited, in 1 shards; 0 of all is less than one" in done.stdout


@one_kind
def test_listing_shows_foreign_and_unfinished_artifacts_and_marks_the_runs_own(own: RunConfig, tmp_path: Path) -> None:
    store = Store(own.store.url)
    store.write("cache/other@3/identity.json", b"{}")
    store.write("cache/broken@1/record.json", b"{}")
    shown = decant("inspect", file_of(own, tmp_path)).stdout
    assert re.search(r"^● prepare/tiny@1 +done +40 +10 +[\d.]+ kB +\d{4}-\d\d-\d\d +[0-9a-f]{8}", shown, re.M)
    assert re.search(r"^● cache/tiny@1 +done +40 +10 ", shown, re.M)
    assert re.search(r"^  cache/other@3 +unfinished +2 B", shown, re.M)
    assert re.search(r"^  cache/broken@1 +damaged", shown, re.M)
    assert re.search(r"^● export/tiny@1 +not made", shown, re.M)
    assert '"response_tokens"' in shown, "the results of the run's own"


@each_kind
def test_description_names_every_column_and_draws_a_picture(made: RunConfig, tmp_path: Path) -> None:
    run = file_of(made, tmp_path)
    done = decant("inspect", run, "cache", "--picture", str(tmp_path / "cache.png"))
    assert done.exit_code == 0, done.stderr
    store, ref = Store(made.store.url), made.ref("cache")
    info = read_manifest(store, ref).shards[0]
    for name in pq.read_schema(store.path(f"{ref}/{info.name}")).names:
        assert re.search(rf"^{name} +\w+ .* %", done.stdout, re.M), name
    assert "[positions]" in done.stdout, "brackets are no markup"
    assert "40 rows in 10 shards" in done.stdout
    assert "positions with a target a sample: 40 values" in done.stdout
    assert "█" in done.stdout
    with Image.open(tmp_path / "cache.png") as picture:
        picture.verify()
        assert picture.width == 1350


@one_kind
def test_pictures_are_written_as_svg_too_and_alike(made: RunConfig, tmp_path: Path) -> None:
    run = file_of(made, tmp_path)
    for name in ("one.svg", "two.svg"):
        assert decant("inspect", run, "prepare/tiny@1", "--picture", str(tmp_path / name)).exit_code == 0
    assert ElementTree.parse(tmp_path / "one.svg").getroot().tag.endswith("svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert decant("inspect", run, "prepare", "--picture", str(tmp_path / "no.svg"), "--dry-run").exit_code == 0
    assert not (tmp_path / "no.svg").exists()
    nowhere = str(tmp_path / "none" / "x.svg")
    refused(decant("inspect", run, "prepare", "--picture", nowhere), "StoreUnavailable", nowhere, "cannot be written")


@one_kind
def test_what_does_not_go_together_is_refused(made: RunConfig, tmp_path: Path) -> None:
    run = file_of(made, tmp_path)
    refused(decant("inspect", run, "cash"), "cash: expected a stage (prepare, cache,", "cache/tiny@1")
    refused(decant("inspect", run, "cache", "--verify"), "leave it out")
    refused(decant("inspect", run, "cache", "--picture", "x.gif"), "x.gif: expected a file that ends with .png or .svg")
    refused(decant("inspect", run, "--picture", "x.png"), "an artifact of prepare or cache")
    refused(decant("inspect", run, "cache/none@1"), "ArtifactMissing", "cache/none@1: does not exist")
    refused(decant("inspect", run, "distill"), "distill/tiny@1: does not exist; run `decant distill RUN.yaml`")


@one_kind
def test_listing_and_describing_import_no_framework(made: RunConfig, tmp_path: Path) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; import jobs.cli;"
        f"assert CliRunner().invoke(jobs.cli.app, ['inspect', {file_of(made, tmp_path)!r}, 'cache']).exit_code == 0;"
        "print(sorted({'torch', 'ray', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
