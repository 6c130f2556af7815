import pytest
import ray
from ray.exceptions import LocalRayletDiedError

from cluster.session import find_users_error, session
from schemas.errors import ClusterLost, ShardCorrupt


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


def test_a_killed_raylet_is_told_as_such_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with pytest.raises(ClusterLost, match=r"\(raylet\) .* was killed; .* run the same command again"), session():
        raise LocalRayletDiedError


def test_a_session_that_does_not_start_says_why_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def times_out(**_: object) -> None:
        raise Exception("the node timed out")

    monkeypatch.setattr(ray, "init", times_out)
    with (
        pytest.raises(ClusterLost, match=r"did not start: the node timed out; .* run the same command again"),
        session(),
    ):
        raise AssertionError("nothing runs without a session")
