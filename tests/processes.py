"""Commands in processes of their own, the processes of the Ray session that each starts, and their ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

# A command imports the frameworks and starts Ray before it works: half a minute here, ten times that on a busy machine.
PATIENCE = 300.0
OUTPUT = "output.txt"
# For tests that start Ray in their own process.
IN_A_SESSION = [
    pytest.mark.ray,
    # Ray's own sockets and files are closed by its processes, not by the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]


@contextmanager
def started(
    command: str, settings: dict[str, Any], folder: Path, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """``decant COMMAND`` in ``folder``; nothing of it or of its session is left after the block."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    with (folder / OUTPUT).open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", command, str(path)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(Path.cwd()), **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        for pid in running_in(folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def running_in(folder: Path) -> dict[int, str]:
    """The processes whose working directory is the folder, by id, and what they call themselves.

    Ray's processes inherit it from the driver and keep it when that is gone.
    """
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it ended, or is another user's
            if process.cwd() == str(folder):
                found[process.pid] = " ".join(process.cmdline())
    return found


def wait_until(true: Callable[[], Any], process: subprocess.Popen[bytes], what: str) -> bool:
    """Whether it came true before the process ended."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.005)
    return True


def kill_when(process: subprocess.Popen[bytes], folder: Path, pattern: str) -> None:
    """SIGKILLs the driver as soon as a file that matches is committed."""
    came = wait_until(lambda: any(folder.glob(pattern)), process, f"{folder}/{pattern}")
    assert came, f"the command ended with {process.returncode} before it was killed"
    process.kill()
    process.wait()
