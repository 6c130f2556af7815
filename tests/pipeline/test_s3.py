"""The store on real S3 servers, which the tests start on loopback and end, alone and behind a proxy that fails."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import s3fs

import pipeline.store
from jobs import prepare
from jobs.stages import open_store
from pipeline.shards import read_manifest
from pipeline.stage import read_record, run_stage
from pipeline.store import Store
from pipeline.verify import verify
from schemas.config import RunConfig
from schemas.errors import SampleInvalid, StoreUnavailable
from schemas.placement import CachePlacement, Placement
from schemas.tables import SAMPLES, targets_table
from tests.conftest import tiny_settings
from tests.pipeline.test_training import assert_alike, assert_same_shards, make_cache
from tests.processes import OUTPUT, PATIENCE, started
from tests.proxy import FAULTS, faulty
from tests.servers import KEY, SECRET, ceph, free_port, missing_ceph, rclone

BUCKET = "decant-test"
# As many threads a teacher in the command's workers as here: sums in one order.
PLACEMENT = Placement(cache=CachePlacement(cpus_per_worker=0.75, decoders=1))


@pytest.fixture(scope="module", params=["rclone", pytest.param("ceph", marks=pytest.mark.slow)])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of an S3 server with one bucket; credentials are in the environment, where s3fs looks."""
    if request.param == "ceph" and missing_ceph():
        pytest.skip(f"needs Ceph's programs {missing_ceph()}: Debian's packages radosgw, ceph-mon and ceph-osd")
    start = {"rclone": rclone, "ceph": ceph}[request.param]
    with start(tmp_path_factory.mktemp("s3")) as endpoint, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        # rclone hands out a whole object's checksum with a part of it, and botocore would refuse the part
        patch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "WHEN_REQUIRED")
        s3fs.S3FileSystem().mkdir(BUCKET)
        yield endpoint
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Only the store's own patience counts, without its waits, or the two below it multiply the time."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr(pipeline.store, "FIRST_WAIT", 0.0)
    s3fs.S3FileSystem.clear_instance_cache()
    yield monkeypatch
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.usefixtures("server")
def test_objects_are_written_listed_read_and_removed() -> None:
    store = Store(f"s3://{BUCKET}/objects")
    assert not store.local
    assert store.names("a@1") == []
    assert store.sizes("a@1") == {}
    assert not store.exists("a@1/x")
    store.write("a@1/x", b"one")
    store.write("a@1/x", b"another")
    store.write("a@1/folder/y", b"")
    assert store.read("a@1/x") == b"another"
    assert store.size("a@1/x") == 7
    assert store.names("a@1") == ["folder", "x"]
    assert store.sizes("a@1") == {"folder/y": 0, "x": 7}
    assert store.is_file("a@1/x")
    assert not store.is_file("a@1/folder")
    store.remove("a@1")
    store.remove("a@1")
    assert not store.exists("a@1/x")
    with pytest.raises(StoreUnavailable, match="a@1/x: cannot be read"):
        store.read("a@1/x")


@pytest.mark.usefixtures("server")
def test_what_another_process_commits_is_seen_at_once() -> None:
    store = Store(f"s3://{BUCKET}/shared")
    store.write("a@1/x", b"mine")
    assert store.names("a@1") == ["x"]
    other = s3fs.S3FileSystem(skip_instance_cache=True)
    other.pipe_file(store.path("a@1/y"), b"theirs")
    other.pipe_file(store.path("a@1/x"), b"their x")
    assert store.exists("a@1/y")
    assert store.read("a@1/y") == b"theirs"
    assert store.size("a@1/x") == 7
    assert store.names("a@1") == ["x", "y"]


def here_and_there(teacher: Path, scenes: Path, folder: Path, name: str) -> tuple[RunConfig, RunConfig]:
    """The same run on local disk and in the bucket."""
    settings: dict[str, Any] = tiny_settings(teacher, scenes, folder / "store")
    settings["prepare"] |= {"shard_rows": 8}
    local, remote = (
        RunConfig.model_validate({**settings, "store": s}) for s in (settings["store"], f"s3://{BUCKET}/{name}")
    )
    return local, remote


def assert_sound(store: Store, run: RunConfig) -> None:
    """Nothing of what is finished is other than it was written, and everything that belongs to it is recorded."""
    tables = {"prepare": SAMPLES, "cache": targets_table(run.cache, (0,))}
    for name, table in tables.items():
        record = read_record(store, run.ref(name))
        assert record is not None
        assert {"identity.json", "manifest.json"} <= record.files.keys()
        assert verify(store, run.ref(name), table) == []


@pytest.mark.usefixtures("server")
def test_cache_on_s3_has_the_local_ones_bytes_trains_alike_and_verifies(
    tiny_teacher: Path, scenes_folder: Path, tmp_path: Path
) -> None:
    here, there = here_and_there(tiny_teacher, scenes_folder, tmp_path, "run")
    remote = assert_alike(here, there)
    assert_sound(remote, there)
    with remote.fs.open(remote.path(f"{there.ref('prepare')}/shard-000000.parquet")) as file:
        assert pq.read_table(file).schema.names == SAMPLES.schema().names
    record = json.loads(open_store(there).read(there.ref("cache").record_path))
    assert SECRET not in json.dumps(record)


def test_store_section_reaches_the_bucket_and_stands_in_nothing_that_is_written(
    server: str, impatient: pytest.MonkeyPatch, tiny_teacher: Path, scenes_folder: Path, tmp_path: Path
) -> None:
    secrets = f"[decant-profile]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n"
    (tmp_path / "credentials").write_text(secrets)
    impatient.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        impatient.delenv(name)
    _, there = here_and_there(tiny_teacher, scenes_folder, tmp_path, "section")
    section = {"url": there.store.url, "endpoint": server, "region": "decant-region", "profile": "decant-profile"}
    run = RunConfig.model_validate({**there.model_dump(mode="json"), "store": section})
    store = open_store(run)
    run_stage(store, prepare.stage(run))
    written = b"".join(store.read(f"{run.ref('prepare')}/{name}") for name in store.sizes(str(run.ref("prepare"))))
    assert there.store.url.encode() in written
    for hidden in (server.removeprefix("http://"), "decant-region", "decant-profile", KEY, SECRET):
        assert hidden.encode() not in written, hidden


@pytest.mark.usefixtures("server")
def test_data_and_images_on_s3_give_the_local_ones_samples(
    tiny_teacher: Path, scenes_folder: Path, tmp_path: Path
) -> None:
    here, _ = here_and_there(tiny_teacher, scenes_folder, tmp_path, "")
    source = Store(f"s3://{BUCKET}/source")
    records = json.loads((scenes_folder / "train.json").read_text())
    for name in ("train.json", *(r["image"] for r in records)):
        source.write(name, (scenes_folder / name).read_bytes())
    away = {"data": f"{source.url}/train.json", "images": source.url}
    there = here.model_copy(update={"prepare": here.prepare.model_copy(update={**away, "artifact": "away@1"})})
    store = open_store(here)
    for run in (here, there):
        run_stage(store, prepare.stage(run))
    one, two = (read_manifest(store, run.ref("prepare")) for run in (here, there))
    assert [s.checksum for s in one.shards] == [s.checksum for s in two.shards]
    gone = there.prepare.model_copy(update={"data": f"{source.url}/none.json", "artifact": "gone@1"})
    with pytest.raises(SampleInvalid, match=r"source/none\.json: no such data file"):
        prepare.stage(there.model_copy(update={"prepare": gone}))


@pytest.mark.slow  # waits for answers that never come; a store that refuses one object is tested by default
def test_cache_through_faults_of_every_kind_has_the_local_ones_bytes(
    server: str, impatient: pytest.MonkeyPatch, tiny_teacher: Path, scenes_folder: Path, tmp_path: Path
) -> None:
    here, there = here_and_there(tiny_teacher, scenes_folder, tmp_path, "faults")
    # ten times what an answer takes on a busy machine; one that is late all the same is one fault more
    impatient.setattr(s3fs.S3FileSystem, "read_timeout", 0.4)
    with faulty(server, rate=0.25, seed=3) as proxy:
        impatient.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        remote = assert_same_shards(here, there)
        assert_sound(remote, there)
    assert set(proxy.faults) == set(FAULTS)
    assert proxy.faults.total() >= 40
    assert max(proxy.stored.values()) > 1, "an object was written again, because the answer to its writing was lost"


def test_store_that_never_takes_an_object_ends_with_its_name_and_the_stage_goes_on_later(
    server: str, impatient: pytest.MonkeyPatch, tiny_teacher: Path, scenes_folder: Path, tmp_path: Path
) -> None:
    here, there = here_and_there(tiny_teacher, scenes_folder, tmp_path, "refused")
    with faulty(server) as proxy:
        impatient.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.refused = f"{there.ref('cache')}/shard-000003.parquet"
        with pytest.raises(StoreUnavailable, match=rf"{proxy.refused}: no answer from the store in 6 attempts"):
            make_cache(there)
        assert read_record(open_store(there), there.ref("cache")) is None
        proxy.refused = None
        remote = assert_same_shards(here, there)
    assert_sound(remote, there)
    written = {path: count for path, count in proxy.stored.items() if path.endswith(".parquet")}
    assert len(written) == 5 + 1 + 5
    assert set(written.values()) == {1}, "no shard is made again"


@pytest.mark.slow
@pytest.mark.ray
def test_commands_on_s3_through_faults_make_the_local_ones_bytes(
    server: str, impatient: pytest.MonkeyPatch, tiny_teacher: Path, scenes_folder: Path, tmp_path: Path
) -> None:
    here, there = here_and_there(tiny_teacher, scenes_folder, tmp_path, "commands")
    here, there = (run.model_copy(update={"placement": PLACEMENT}) for run in (here, there))
    # how a user sets the patience of s3fs, of which the command's workers have heard as well
    timeout = json.dumps({"config_kwargs": {"read_timeout": 1}})
    with faulty(server, rate=0.1, seed=4) as proxy:
        impatient.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        for command in ("prepare", "cache"):
            with started(command, there.model_dump(mode="json"), tmp_path, FSSPEC_S3=timeout) as process:
                assert process.wait(PATIENCE) == 0, (tmp_path / OUTPUT).read_text()
        assert_sound(open_store(there), there)
        assert_same_shards(here, there)
    assert proxy.faults.total() >= 10


@pytest.mark.usefixtures("server")
def test_store_that_is_gone_is_named(impatient: pytest.MonkeyPatch) -> None:
    impatient.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(StoreUnavailable, match=rf"{BUCKET}/a@1/x: no answer from the store in 6 attempts"):
        Store(f"s3://{BUCKET}").write("a@1/x", b"data")


@pytest.mark.usefixtures("server")
def test_wrong_credentials_are_told_whatever_is_asked(impatient: pytest.MonkeyPatch) -> None:
    impatient.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    store = Store(f"s3://{BUCKET}/refused")
    for ask in (store.exists, store.is_file, store.size, store.names, store.sizes, store.remove, store.read):
        with pytest.raises(StoreUnavailable, match=r"refused/x: (not allowed|cannot be read)") as refusal:
            ask("x")
        assert "wrong" not in str(refusal.value)
    with pytest.raises(StoreUnavailable, match="refused/x: cannot be written"):
        store.write("x", b"x")
