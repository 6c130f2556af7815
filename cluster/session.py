"""Starts or joins the Ray session in which a run's stages execute, and says who may use it: whoever has its token."""

import logging
import os
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from schemas import errors
from schemas.errors import ClusterLost, ClusterUnavailable, DecantError

# Ray's own switches; set before Ray is imported, kept where the user has set them.
SWITCHES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # its C++ side prints harmless errors into the terminal; errors of workers arrive as exceptions
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # relative paths of the run file mean the same to every worker
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # without it a task that Ray's memory monitor ends is begun again for ever
    "RAY_task_oom_retries": "3",
}
# A session on one machine is not pre-empted, and its controller may look twice a second.
QUICK = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
# The label of the one node of a session that is ours alone.
LOCAL = "decant/session"
# Seconds for a cluster's head to take a connection.
KNOCK = 10.0
# Where Ray looks for a token, in this order.
TOKENS, TOKEN_FILE = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"), Path(".ray", "auth_token")
# Two logical CPUs at least, so that a pool of workers never takes every CPU from the tasks that feed it.
MIN_CPUS = 2
AGAIN = "see that memory and disk suffice, then run the same command again: it goes on with what is missing"


@contextmanager
def session(folder: str | None = None, *, join: bool = False) -> Iterator[None]:
    """A private Ray cluster on this machine, ended with the block; joins the caller's session where one is running.

    With ``join`` it is the cluster that runs on this machine, or that ``RAY_ADDRESS`` names; ``folder`` then travels to
    every node, where it is the working directory of workers. Ray's ports are guarded by a token that lives in this
    process's environment only, or for a cluster by that which Ray finds.

    Raises:
        ClusterLost: Ray does not start, or its process on this machine was killed.
        ClusterUnavailable: there is no cluster to join, or it refuses us.
    """
    (as_guest if join else as_host)()
    import ray

    if ray.is_initialized():
        with _users_errors():
            yield
        return
    if join:
        _join(folder)
    else:
        _start()
    try:
        with _users_errors():
            yield
    finally:
        ray.shutdown()


def as_guest() -> None:
    """Sets Ray's switches for a cluster that runs, its token used where Ray finds one; before Ray is imported."""
    _set(SWITCHES)
    # Ray's clients send no token unless told to
    if any(name in os.environ for name in TOKENS) or (Path.home() / TOKEN_FILE).exists():
        _set({"RAY_AUTH_MODE": "token"})


def as_host() -> None:
    """Sets Ray's switches for a session of one's own, with a token of its own; before Ray is imported."""
    _set(SWITCHES)
    if "RAY_AUTH_MODE" not in os.environ:
        _set({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})


def _set(switches: dict[str, str]) -> None:
    for name, value in switches.items():
        os.environ.setdefault(name, value)


def _join(folder: str | None) -> None:
    import ray

    environment = {"working_dir": folder} if folder else None
    try:
        _knock(os.environ.get("RAY_ADDRESS", ""))
        ray.init(address="auto", runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray has no type of its own for it
        raise ClusterUnavailable(
            f"--on auto: no cluster to join: {error}; `ray start --head` starts one, RAY_ADDRESS names one elsewhere, "
            "RAY_AUTH_TOKEN_PATH the file with its token"
        ) from error


def _knock(address: str) -> None:
    """Raises OSError where nothing listens at HOST:PORT, for which Ray would wait for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=KNOCK).close()


def _start() -> None:
    import ray

    _set(QUICK)  # not where a cluster was joined, whose nodes can go
    try:
        # "local": a plain ray.init() would join whatever cluster happens to run on this machine
        ray.init(
            address="local",
            num_cpus=max(MIN_CPUS, os.cpu_count() or 1),
            labels={LOCAL: "local"},
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # Ray has no type of its own for it
        raise ClusterLost(f"Ray did not start: {error}; {AGAIN}") from error


@contextmanager
def _users_errors() -> Iterator[None]:
    """A user's error that a worker raised arrives as itself, not wrapped in Ray's tracebacks."""
    from ray.exceptions import LocalRayletDiedError

    try:
        yield
    except Exception as error:
        found = find_users_error(error)
        if found is not None and found is not error:
            raise found from None
        if isinstance(error, LocalRayletDiedError):
            raise ClusterLost(f"Ray's own process (raylet) on this machine was killed; {AGAIN}") from None
        raise


def find_users_error(error: BaseException) -> DecantError | None:
    """The ``DecantError`` inside an exception of Ray Core, Ray Data or Ray Train, None where there is none."""
    # inside first: Ray's wrapper of a task's error is an instance of the wrapped type as well
    inner = [getattr(error, "cause", None), error.__cause__, *getattr(error, "worker_failures", {}).values()]
    for candidate in inner:
        found = find_users_error(candidate) if isinstance(candidate, BaseException) else None
        if found is not None:
            return found
    return error if isinstance(error, DecantError) else _from_traceback(str(error))


def _from_traceback(text: str) -> DecantError | None:
    """The error as a remote traceback prints it; Ray Data leaves nothing else of an exception in a user's function."""
    match = re.search(r"^schemas\.errors\.(\w+): (.+?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    kind = getattr(errors, match[1], None) if match else None
    return kind(match[2]) if match and kind else None
