"""Stages as Ray jobs: submitted to a cluster's dashboard, followed to their ends, listed and stopped."""

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from cluster.session import AGAIN, as_guest
from schemas.errors import ClusterLost, ClusterUnavailable

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

# What marks a job as ours, and says what it does.
RUN, STAGES = "decant.run", "decant.stages"
# The exit code of a job without one of its own: its driver never started, or was stopped.
FAILED, STOPPED = 1, 130
# Seconds between two looks at a job, and for how long a dashboard may be away while a job is followed.
POLL, PATIENCE = 0.5, 120.0


@dataclass(frozen=True)
class Job:
    """One submitted job, as the cluster knows it; times in seconds since 1970."""

    id: str
    run: str
    stages: str
    status: str
    started: float | None
    ended: float | None

    @property
    def began(self) -> str:
        """When it started, by this machine's clock."""
        return f"{datetime.fromtimestamp(self.started):%Y-%m-%d %H:%M:%S}" if self.started else "not yet"

    @property
    def seconds(self) -> float | None:
        """How long it ran, or has been running."""
        return (self.ended or time.time()) - self.started if self.started else None


def connect(address: str) -> "JobSubmissionClient":
    """A client of the dashboard at ``address`` (``http://head:8265``).

    Raises:
        ClusterUnavailable: nothing answers there, it refuses us, or it runs another Ray than this process.
    """
    as_guest()
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray's client goes by the environment before it goes by this
    import ray
    from ray.job_submission import JobSubmissionClient

    # its client tells what it packs and when its sockets close
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger(JobSubmissionClient.__module__).setLevel(logging.ERROR)
    try:
        client = JobSubmissionClient(address)
        there: str = client._server_ray_version  # which it asked for to see whether anything answers
    except Exception as error:  # of requests and Ray's own, which share no type
        raise ClusterUnavailable(f"--on {address}: {_reason(error)}; {_remedy(error)}") from None
    if there.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise ClusterUnavailable(
            f"--on {address}: the cluster runs Ray {there}, this is Ray {ray.__version__}; use the same on both sides"
        )
    return client


def submit(client: "JobSubmissionClient", arguments: Sequence[str], folder: str, run: str, stages: str) -> str:
    """Has ``python -m jobs.cli ARGUMENTS`` run on the cluster, in a copy of ``folder``; returns the job's id."""
    with _answered(client):
        found: str = client.submit_job(
            entrypoint=" ".join(["exec", "python", "-u", "-m", "jobs.cli", *arguments]),
            runtime_env={"working_dir": folder},
            metadata={RUN: run, STAGES: stages},
            submission_id=f"{run}-{stages.replace(',', '-')}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}",
        )
    return found


def follow(client: "JobSubmissionClient", job: str, write: Callable[[str], object]) -> int:
    """Hands on what the job prints, from its start to its end; returns its exit code.

    Raises:
        ClusterLost: the dashboard stays away, or its cluster was started anew.
    """
    from aiohttp import ClientError

    log, away = _Log(write), None
    while True:
        try:
            asyncio.run(_tail(client, job, log))
            info = client.get_job_info(job)
            away = None
        except (RuntimeError, OSError, ClientError) as error:
            if "404" in str(error):
                raise ClusterLost(
                    f"{client.get_address()}: knows no job {job}; the cluster was started anew since; {AGAIN}"
                ) from None
            away = away or time.monotonic()
            if time.monotonic() - away > PATIENCE:
                raise ClusterLost(
                    f"{client.get_address()}: no answer for {PATIENCE:.0f} s: {_reason(error)}; the job may go on "
                    f"without us: `decant jobs logs {job} --on ADDRESS`"
                ) from None
            time.sleep(POLL)
            continue
        if info.status.is_terminal():
            return _exit_code(info, write)
        time.sleep(POLL)


@dataclass
class _Log:
    """Where a job's log goes, and how many characters of it have gone there."""

    write: Callable[[str], object]
    shown: int = 0


async def _tail(client: "JobSubmissionClient", job: str, log: _Log) -> None:
    """Hands on what has not been shown; every tail begins with the log's start."""
    seen = 0
    async for text in client.tail_job_logs(job):
        log.write(text[max(0, log.shown - seen) :])
        seen += len(text)
        log.shown = max(log.shown, seen)


def _exit_code(info: Any, write: Callable[[str], object]) -> int:
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "STOPPED":
        write("the job was stopped\n")
        return STOPPED
    code = info.driver_exit_code
    if code is None or code < 0:
        write(f"{info.message}\n")
    return FAILED if code is None else code if code >= 0 else 128 - code


def jobs(client: "JobSubmissionClient") -> list[Job]:
    """Our jobs on the cluster, the latest last."""
    with _answered(client):
        found = [info for info in client.list_jobs() if RUN in (info.metadata or {})]
    return sorted(map(_job, found), key=lambda job: job.started or float("inf"))


def _job(info: Any) -> Job:
    def seconds(milliseconds: int | None) -> float | None:
        return milliseconds / 1000 if milliseconds else None

    return Job(
        info.submission_id,
        info.metadata[RUN],
        info.metadata.get(STAGES, ""),
        info.status.value.lower(),
        seconds(info.start_time),
        seconds(info.end_time),
    )


def stop(client: "JobSubmissionClient", job: str) -> bool:
    """Asks the job to end; whether it was running."""
    with _answered(client):
        return bool(client.stop_job(job))


@contextmanager
def _answered(client: "JobSubmissionClient") -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise ClusterUnavailable(f"{client.get_address()}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _remedy(error: Exception) -> str:
    if "uthenticat" in str(error):
        return "give the cluster's token in RAY_AUTH_TOKEN, or the file with it in RAY_AUTH_TOKEN_PATH"
    return "see that its head runs, and that this address is its dashboard's (http://HEAD:8265, maybe through a tunnel)"
