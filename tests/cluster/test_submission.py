"""How a job is followed, with a client that answers as Ray's does; tests/jobs/test_cluster.py has the real one."""

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import submission
from cluster.submission import RUN, STAGES, STOPPED, follow, jobs
from schemas.errors import ClusterLost


class Status(str):
    def is_terminal(self) -> bool:
        return self not in ("PENDING", "RUNNING")

    @property
    def value(self) -> str:
        return str(self)


class Client:
    """Gives the log from its start at every tail, up to where the connection breaks, then the job's states in turn."""

    def __init__(self, log: str, breaks: list[int], *ends: Any) -> None:
        self.log, self.breaks, self.ends = log, breaks, list(ends)

    def get_address(self) -> str:
        return "http://head:8265"

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        end = self.breaks.pop(0) if self.breaks else len(self.log)
        for start in range(0, end, 7):
            yield self.log[start : min(end, start + 7)]
        if end < len(self.log):
            raise RuntimeError("WebSocket connection closed unexpectedly")

    def get_job_info(self, _: str) -> Any:
        return self.ends.pop(0) if len(self.ends) > 1 else self.ends[0]


def ended(status: str, code: int | None = None, message: str = "") -> Any:
    return SimpleNamespace(status=Status(status), driver_exit_code=code, message=message)


LOG = "prepare: 10/100 records\nprepare: 100/100 records\nprepare/tiny@1 done in 3.0 s\n"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "POLL", 0.0)


def test_every_line_is_shown_once_though_connections_break() -> None:
    said: list[str] = []
    client: Any = Client(LOG, [0, 20, 20, 45], ended("RUNNING"), ended("SUCCEEDED", 0))
    assert follow(client, "job", said.append) == 0
    assert "".join(said) == LOG


@pytest.mark.parametrize(
    ("info", "code", "says"),
    [
        (ended("SUCCEEDED", 0), 0, ""),
        (ended("FAILED", 2, "Job entrypoint command failed"), 2, ""),
        (ended("FAILED", None, "runtime_env setup failed"), 1, "runtime_env setup failed\n"),
        (ended("FAILED", -9, "driver was killed"), 137, "driver was killed\n"),
        (ended("STOPPED"), STOPPED, "the job was stopped\n"),
    ],
)
def test_the_exit_code_is_the_jobs_own(info: Any, code: int, says: str) -> None:
    said: list[str] = []
    client: Any = Client(LOG, [], ended("RUNNING"), info)
    assert follow(client, "job", said.append) == code
    assert "".join(said) == LOG + says


def test_a_dashboard_that_stays_away_is_told_and_the_job_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "PATIENCE", 0.05)
    client: Any = Client(LOG, [5] * 10**6, ended("RUNNING"))
    with pytest.raises(ClusterLost, match=r"head:8265: no answer .* may go on .* `decant jobs logs job "):
        follow(client, "job", lambda _: None)


def test_only_our_jobs_are_listed_the_latest_last() -> None:
    def info(name: str, started: int | None, **metadata: str) -> Any:
        return SimpleNamespace(
            submission_id=name, status=Status("RUNNING"), start_time=started, end_time=None, metadata=metadata
        )

    known = [info("b", 2000, **{RUN: "demo", STAGES: "cache"}), info("other", 1), info("c", None, **{RUN: "demo"})]
    known.append(info("a", 1000, **{RUN: "demo", STAGES: "prepare"}))
    client: Any = SimpleNamespace(list_jobs=lambda: known, get_address=lambda: "http://head:8265")
    found = jobs(client)
    assert [job.id for job in found] == ["a", "b", "c"]
    assert (found[1].run, found[1].stages, found[1].status, found[1].started) == ("demo", "cache", "running", 2.0)
    assert (found[2].began, found[2].seconds) == ("not yet", None)
