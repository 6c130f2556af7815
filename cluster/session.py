"""Starts and ends the Ray session in which a run's stages execute."""

import logging
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from schemas import errors
from schemas.errors import ClusterLost, DecantError

# Ray's own switches; set before Ray is imported, kept where the user has set them.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # its C++ side prints harmless errors into the terminal; errors of workers arrive as exceptions
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # a session on one machine is not pre-empted, and its controller may look twice a second
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
# Two logical CPUs at least, so that a pool of workers never takes every CPU from the tasks that feed it.
MIN_CPUS = 2
AGAIN = "see that memory and disk suffice, then run the same command again: it goes on with what is missing"


@contextmanager
def session() -> Iterator[None]:
    """A private Ray cluster on this machine, ended with the block; joins the caller's session where one is running.

    Ray's ports are guarded by a token that lives in this process's environment only.

    Raises:
        ClusterLost: Ray does not start, or its process on this machine was killed.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    if ray.is_initialized():
        with _users_errors():
            yield
        return
    _start()
    try:
        with _users_errors():
            yield
    finally:
        ray.shutdown()


def _start() -> None:
    import ray

    try:
        # "local": a plain ray.init() would join whatever cluster happens to run on this machine
        ray.init(
            address="local",
            num_cpus=max(MIN_CPUS, os.cpu_count() or 1),
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
