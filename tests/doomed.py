"""Workers that die as a killed process does, so often as a file says: at one shard, or before they are made."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa

import jobs.cache
import jobs.prepare
from jobs.cache import CacheJob, TeacherActor, decode_shard
from jobs.prepare import PrepareJob, PrepareWorker

# Names the folder with the files; of the environment, because workers are other processes.
FOLDER = "DECANT_TEST_DOOM"
START, DECODE = "start", "decode"


def doom(where: str | int, times: int) -> None:
    """The next workers that come there, ``times`` of them, die."""
    Path(os.environ[FOLDER], str(where)).write_text("x" * times)


def pass_by(where: str | int) -> None:
    """Dies if it is said so."""
    path = Path(os.environ[FOLDER], str(where))
    if path.exists() and (left := path.read_text()):
        path.write_text(left[1:])
        os._exit(1)


class DoomedWorker(PrepareWorker):
    def __init__(self, job: PrepareJob) -> None:
        super().__init__(job)
        really = jobs.prepare.prepare_shard

        def prepare_shard(*given: Any) -> int:
            pass_by(given[5])
            return really(*given)

        jobs.prepare.prepare_shard = prepare_shard


class DoomedTeacher(TeacherActor):
    def __init__(self, job: CacheJob) -> None:
        make, write = jobs.cache.Teacher, jobs.cache.write_shard

        def teacher(*given: Any) -> Any:
            pass_by(START)
            return make(*given)

        def write_shard(*given: Any) -> None:
            pass_by(given[3])
            write(*given)

        jobs.cache.Teacher, jobs.cache.write_shard = teacher, write_shard  # type: ignore[misc,assignment]
        super().__init__(job)


def doomed_decode(row: pa.Table, job: CacheJob) -> pa.Table:
    """In place of the function that decodes a shard's images."""
    pass_by(DECODE)
    return decode_shard(row, job)
