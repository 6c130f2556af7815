import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.session import as_guest, find_users_error, session
from schemas.errors import ClusterLost, ClusterUnavailable, ShardCorrupt
from tests.servers import free_port


class Wrapper(Exception):
    """As Ray's: the error as it was, in an attribute."""

    def __init__(self, cause: BaseException | None = None, workers: dict[int, BaseException] | None = None) -> None:
        super().__init__("long remote traceback")
        self.cause, self.worker_failures = cause, workers or {}


class Dual(Wrapper, ShardCorrupt):
    """As Ray's wrapper of a task's error: an instance of the wrapped type as well, with another text."""


def test_the_users_error_is_found_inside_rays() -> None:
    error = ShardCorrupt("shard 3 is broken")
    assert find_users_error(error) is error
    assert find_users_error(Dual(error)) is error
    assert find_users_error(Wrapper(workers={1: Wrapper(error)})) is error
    outer = RuntimeError("job failed")
    outer.__cause__ = Dual(error)
    assert find_users_error(outer) is error


def test_other_errors_stay_what_they_are() -> None:
    assert find_users_error(Wrapper(KeyError("x"), {0: RuntimeError("y")})) is None


def test_an_error_of_which_only_the_traceback_is_left_is_found() -> None:
    told = "schemas.errors.ShardCorrupt: shard 3 is broken\n  in two lines"
    text = f"ray::f()\n  File x, line 3\n{told}\n\nThe above exception was the cause"
    found = find_users_error(RuntimeError(text))
    assert isinstance(found, ShardCorrupt)
    assert str(found) == "shard 3 is broken\n  in two lines"
    assert find_users_error(RuntimeError("schemas.errors.NoSuchError: x")) is None


class RayletDied(Exception):
    pass


@pytest.fixture
def stub_ray(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a stub in Ray's place, which itself must not be imported before its switches are set."""

    def put(**parts: Any) -> None:
        monkeypatch.setattr(os, "environ", dict(os.environ))
        monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(**parts))
        monkeypatch.setitem(sys.modules, "ray.exceptions", SimpleNamespace(LocalRayletDiedError=RayletDied))

    return put


def test_a_killed_raylet_is_told_as_such_and_what_to_do(stub_ray: Callable[..., None]) -> None:
    stub_ray(is_initialized=lambda: True)
    with pytest.raises(ClusterLost, match=r"\(raylet\) .* was killed; .* run the same command again"), session():
        raise RayletDied


def test_a_cluster_that_does_not_answer_is_told_at_once(
    stub_ray: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_ray(is_initialized=lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    with pytest.raises(ClusterUnavailable, match=r"--on auto: .* refused; `ray start --head`"), session(join=True):
        raise AssertionError("nothing runs without a cluster")


def test_a_clusters_token_is_used_where_there_is_one(
    stub_ray: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stub_ray()
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    as_guest()
    assert "RAY_AUTH_MODE" not in os.environ
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("token")
    as_guest()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_a_session_that_does_not_start_says_why_and_what_to_do(stub_ray: Callable[..., None]) -> None:
    def times_out(**_: object) -> None:
        raise RuntimeError("the node timed out")

    stub_ray(is_initialized=lambda: False, init=times_out)
    why = r"did not start: the node timed out; .* run the same command again"
    with pytest.raises(ClusterLost, match=why), session():
        raise AssertionError("nothing runs without a session")
