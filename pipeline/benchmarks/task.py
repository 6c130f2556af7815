"""What a benchmark is to Decant: questions as it words them, a scorer, and the file that its server takes.

Every benchmark and every probe is one ``Task``; teacher and student answer its items through the same code.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

# Resamples of a bootstrap: the 95 % interval's ends are the 25th and 976th of them, which then have a standard error
# of about 0.5 points of percentile.
RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Item:
    """One question.

    ``prompt`` is the user's turn, without image marks; ``images`` (files, or the encoded picture itself) stand before
    it in order. ``reference`` is what the scorer compares with, None where the labels are not public. ``group`` is the
    part of the benchmark that it belongs to (subtask, split, length).
    """

    id: str
    prompt: str
    images: tuple[Path | bytes, ...] = ()
    reference: Any = None
    group: str | None = None

    def pictures(self) -> tuple[bytes, ...]:
        """The encoded images."""
        return tuple(image if isinstance(image, bytes) else image.read_bytes() for image in self.images)


@dataclass(frozen=True)
class Score:
    """One figure of a task: ``statistic(units_UC)``.

    A row of ``units_UC`` (float64) is what is independent of the others, such as a question, or an image with its two
    questions; resampling rows gives the figure's interval. ``scale`` is the highest value that it can have. ``gain``
    says whether more is better, without which a share of the teacher's figure would say nothing.
    """

    units_UC: np.ndarray
    statistic: Callable[[np.ndarray], float]
    scale: float = 1.0
    gain: bool = True

    def estimate(self) -> dict[str, Any]:
        """``value``, ``scale``, ``n`` (rows) and the percentile bootstrap's 95 % interval ``ci95`` (Efron 1979)."""
        draws = [self.statistic(self.units_UC[rows]) for rows in resamples(len(self.units_UC))]
        value = float(self.statistic(self.units_UC))
        return {"value": value, "scale": self.scale, "n": len(self.units_UC), "ci95": interval(draws)}


def mean(units_UC: np.ndarray) -> float:
    """The mean of the first column."""
    return float(units_UC[:, 0].mean())


def accuracy(hits: Sequence[float]) -> Score:
    """The share of right answers, or the mean of soft ones."""
    return Score(np.asarray(hits, np.float64)[:, None], mean)


def by_group(values: Sequence[float], groups: Sequence[str | None]) -> dict[str, Score]:
    """``accuracy`` over all, and over each group by its name; what has no group counts in the first alone."""
    names = sorted({group for group in groups if group is not None})
    parts = {n: [v for v, group in zip(values, groups, strict=True) if group == n] for n in names}
    return {"accuracy": accuracy(values), **{name: accuracy(part) for name, part in parts.items()}}


def recovery(student: Score, teacher: Score) -> dict[str, Any]:
    """The student's figure as a share of the teacher's; ``value`` is None where the teacher's is 0.

    Both are drawn anew with the same rows, since they answered the same questions.
    """
    assert len(student.units_UC) == len(teacher.units_UC), "both answer the same questions"
    whole = teacher.statistic(teacher.units_UC)
    draws = []
    for rows in resamples(len(teacher.units_UC)):
        if below := teacher.statistic(teacher.units_UC[rows]):
            draws.append(student.statistic(student.units_UC[rows]) / below)
    value = student.statistic(student.units_UC) / whole if whole else None
    return {"value": value, "ci95": interval(draws) if value is not None else None}


def resamples(units: int) -> Iterator[np.ndarray]:
    """int64[units], RESAMPLES times: rows drawn with replacement, the same for every model."""
    draw = np.random.default_rng(0)
    for _ in range(RESAMPLES):
        yield draw.integers(0, units, units)


def interval(draws: Sequence[float]) -> list[float]:
    """The central 95 % of the draws."""
    tail = (1 - LEVEL) / 2
    return [float(q) for q in np.quantile(np.asarray(draws), [tail, 1 - tail])]


def nothing(_items: Sequence[Item], _answers: Sequence[str]) -> Mapping[str, bytes]:
    """The files of a benchmark that is scored here."""
    return {}


@dataclass(frozen=True)
class Task:
    """A benchmark or probe.

    ``read`` takes the folder with the published files and raises SampleInvalid with file, record and field where they
    are not as published. ``score`` gives the figures by name, the headline first; it is empty where labels are not
    public. ``files`` are what the benchmark's server or grader takes, by file name.
    """

    name: str
    max_new_tokens: int
    read: Callable[[Path], list[Item]]
    score: Callable[[Sequence[Item], Sequence[str]], dict[str, Score]]
    files: Callable[[Sequence[Item], Sequence[str]], Mapping[str, bytes]] = field(default=nothing)
