"""Starts and ends the Ray session in which a run's stages execute."""

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

# Ray's own switches; set before Ray is imported, kept where the user has set them.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # a session on one machine is not pre-empted, and its controller may look twice a second
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
# Two logical CPUs at least, so that a pool of workers never takes every CPU from the tasks that feed it.
MIN_CPUS = 2


@contextmanager
def session(*, verbose: bool = False) -> Iterator[None]:
    """A private Ray cluster on this machine, ended with the block; joins the caller's session where one is running.

    Ray's ports are guarded by a token that lives in this process's environment only.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    if ray.is_initialized():
        yield
        return
    # "local": a plain ray.init() would join whatever cluster happens to run on this machine
    ray.init(
        address="local",
        num_cpus=max(MIN_CPUS, os.cpu_count() or 1),
        include_dashboard=False,
        log_to_driver=verbose,
        logging_level=logging.INFO if verbose else logging.ERROR,
    )
    try:
        yield
    finally:
        ray.shutdown()
