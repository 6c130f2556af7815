"""Which published benchmarks a run answers, and where their files are."""

from typing import Literal

from pydantic import Field

from schemas.sections import Section

BenchmarkName = Literal[
    "mme", "mmbench", "mmbench_circular", "textvqa", "gqa", "mmvet", "scienceqa", "pope", "mmmu", "vqav2"
]


class BenchmarkConfig(Section):
    """A benchmark: the folder with its files as they are published, and how many of its questions to ask (all).

    ``seed`` is for those whose official scorer guesses where an answer says nothing (MMMU); without one, such an
    answer is wrong.
    """

    task: BenchmarkName
    path: str
    limit: int | None = Field(None, ge=1)
    seed: int | None = None
