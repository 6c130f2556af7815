"""The store on a real S3 server, which the tests start on loopback and end."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import s3fs

from jobs.stages import open_store
from pipeline.store import Store
from pipeline.verify import verify
from schemas.config import RunConfig
from schemas.errors import StoreUnavailable
from schemas.tables import SAMPLES
from tests.conftest import tiny_settings
from tests.pipeline.test_training import assert_alike

BUCKET = "decant-test"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of an S3 server with one bucket; credentials are in the environment, where s3fs looks."""
    folder = tmp_path_factory.mktemp("s3")
    (folder / BUCKET).mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    key, secret = "tester", "not-a-secret"
    rclone = Path(sys.executable).with_name("rclone")
    command = [str(rclone), "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{key},{secret}", str(folder)]
    patch = pytest.MonkeyPatch()
    endpoint = f"http://127.0.0.1:{port}"
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        patch.setenv(name, value)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield endpoint
    finally:
        process.kill()
        process.wait()
        patch.undo()
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
    assert not store.exists("a@1/x")
    with pytest.raises(StoreUnavailable, match="a@1/x: cannot be read"):
        store.read("a@1/x")


@pytest.mark.usefixtures("server")
def test_cache_on_s3_has_the_local_ones_bytes_trains_alike_and_verifies(
    tiny_teacher: Path, scenes_folder: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = tiny_settings(tiny_teacher, scenes_folder, tmp_path / "store")
    here, there = (
        RunConfig.model_validate({**settings, "store": s}) for s in (settings["store"], f"s3://{BUCKET}/run")
    )
    remote = assert_alike(here, there)
    assert verify(remote, there.ref("prepare"), SAMPLES) == []
    with remote.fs.open(remote.path(f"{there.ref('prepare')}/shard-000000.parquet")) as file:
        assert pq.read_table(file).schema.names == SAMPLES.schema().names
    record = json.loads(open_store(there).read(there.ref("cache").record_path))
    assert "not-a-secret" not in json.dumps(record)


def test_store_that_is_gone_is_named(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    # only the store's own patience, or the two below it multiply the time
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr("pipeline.store.time.sleep", lambda _: None)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreUnavailable, match=rf"{BUCKET}/a@1/x: no answer from the store in 6 attempts"):
        Store(f"s3://{BUCKET}").write("a@1/x", b"data")
    s3fs.S3FileSystem.clear_instance_cache()
