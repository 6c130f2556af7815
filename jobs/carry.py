"""What travels with a run to a cluster: the resolved run file, the code, and files that it names by relative paths.

All of it goes into one folder, which becomes the working directory of the job and of its workers on every node. So a
relative path means the file that travelled, an absolute one what every node has at that place, a URL itself.
"""

import shutil
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Literal

from schemas.config import RunConfig
from schemas.errors import ConfigInvalid
from schemas.runfile import dump_run

Code = Literal["upload", "installed"]
RUN_FILE = "run.yaml"
PACKAGES = ("schemas", "pipeline", "cluster", "jobs")
# Ray holds what travels in the head's memory, and takes 512 MiB at the most.
LARGEST = 256 * 2**20
# Where nothing else is named, images are beside the data; a whole working directory does not travel.
ANYWHERE = "."


def pack(run: RunConfig, stages: Sequence[str], code: Code, folder: Path) -> None:
    """Fills the folder with all that the stages need of this machine.

    Raises:
        ConfigInvalid: the store is a folder that only this machine has, or a file is missing, too large or elsewhere
            than below the working directory.
    """
    if not is_everywhere(run.store.url):
        raise ConfigInvalid(
            f"store: {run.store.url} is a folder of this machine; on a cluster it is a URL (s3://bucket/decant), or "
            "the absolute path of a folder that all nodes share"
        )
    if code == "upload":
        for package in PACKAGES:
            with resources.as_file(resources.files(package)) as source:
                shutil.copytree(source, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    size = 0
    for setting, path in carried(run, stages):
        size += _carry(setting, path, folder)
        if size > LARGEST:
            raise ConfigInvalid(
                f"{setting}: with {path} more than {LARGEST // 2**20} MiB would travel with the job; put it at a URL, "
                "or at an absolute path that all nodes share"
            )
    (folder / RUN_FILE).write_text(dump_run(run))


def carried(run: RunConfig, stages: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Settings with relative paths of files or folders that are there, as far as the stages read them."""
    for setting, path in paths_of(run, stages).items():
        if not is_everywhere(path) and path != ANYWHERE and (setting != "teacher.path" or Path(path).exists()):
            yield setting, Path(path)


def paths_of(run: RunConfig, stages: Sequence[str]) -> dict[str, str]:
    """The teacher's path, and those of data that the stages read, by setting."""
    named = {"teacher.path": run.teacher.path}
    for stage in ("prepare", "evaluate"):
        if stage in stages:
            section = getattr(run, stage)
            named |= {f"{stage}.data": section.data, f"{stage}.images": section.images}
    if "evaluate" in stages:
        named |= {f"evaluate.benchmarks.{n}.path": task.path for n, task in enumerate(run.evaluate.benchmarks)}
    return named


def is_everywhere(path: str) -> bool:
    """Whether the path means the same on every node: a URL, or absolute."""
    return "://" in path or Path(path).is_absolute()


def _carry(setting: str, path: Path, folder: Path) -> int:
    """Copies a file or folder to the same relative path; returns the bytes that this added."""
    if not path.exists():
        raise ConfigInvalid(f"{setting}: {path}: no such file or folder; it would travel with the job")
    if not path.resolve().is_relative_to(Path.cwd()):
        raise ConfigInvalid(
            f"{setting}: {path} is not below the working directory, so it cannot travel with the job; give an absolute "
            "path that all nodes share, or a URL"
        )
    size = 0
    for source in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        target = folder / source
        if not target.exists() and size <= LARGEST:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            size += target.stat().st_size
    return size
