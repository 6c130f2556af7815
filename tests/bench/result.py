"""The one form of a benchmark's figures: sides, the ratios between them, and what they were measured with.

Every script here takes ``--json FILE`` (``-``: the last line of the output) and leaves a ``Result`` there. What may be
required of a run are its ratios, whose both sides were measured in that run; never an absolute time.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pipeline.stage import provenance

# Beside the versions that a stage records: whose kernels are timed.
KERNELS = ("triton", "mamba_ssm", "causal_conv1d")
Figures = Mapping[str, float | str | None]


@dataclass(frozen=True)
class Result:
    """What one run of a script found.

    ``topic`` is the script's name, ``sides`` what was measured of each side (units in the figures' names), ``ratios``
    what follows of them, ``floor`` the side that no other can beat, where one was measured.
    """

    topic: str
    command: str
    sides: Mapping[str, Figures]
    ratios: Mapping[str, float]
    floor: str | None = None

    def __post_init__(self) -> None:
        assert self.ratios, "a benchmark compares"
        assert self.floor is None or self.floor in self.sides, f"{self.floor} was not measured"

    def record(self) -> dict[str, Any]:
        """The result with commit, date and hardware, as JSON values; what is not finite is null."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return _finite({**asdict(self), "commit": commit(), "date": now, "hardware": hardware()})

    def write(self, where: str | None) -> None:
        """To the file, to the standard output as one line (``-``), or nowhere."""
        if where == "-":
            print(json.dumps(self.record()), flush=True)
        elif where:
            Path(where).write_text(json.dumps(self.record(), indent=1) + "\n")


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option whose value ``Result.write`` takes."""
    parser.add_argument("--json", metavar="FILE", help="write the figures and their ratios as JSON; -: to the output")


def command(topic: str, arguments: Sequence[str] | None) -> str:
    """The command line of a script; None stands for what this process was started with."""
    given = sys.argv[1:] if arguments is None else arguments
    return shlex.join(["python", "-m", f"tests.bench.{topic}", *given])


def commit() -> str | None:
    """The checkout's commit, with ``+`` where files differ from it; without git, what DECANT_COMMIT says."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty=+"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("DECANT_COMMIT")
    return found.stdout.strip()


def hardware() -> dict[str, Any]:
    """The devices and CPUs of this machine, and the versions of what computes on them."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    made = provenance()
    kernels = {name: version for name in KERNELS if (version := _version(name))}
    devices = [torch.cuda.get_device_name(i) for i in range(count)]
    return {**made, "versions": made["versions"] | kernels, "gpus": devices, "cpus": os.cpu_count()}


def print_table(sides: Mapping[str, Figures]) -> None:
    """The sides as Markdown, a row each."""
    names = list(dict.fromkeys(name for figures in sides.values() for name in figures))
    print(f"| | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for side, figures in sides.items():
        print(f"| {side} | {' | '.join(_shown(figures.get(name)) for name in names)} |", flush=True)


def _shown(value: float | str | None) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "–" if value is None else str(value)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
