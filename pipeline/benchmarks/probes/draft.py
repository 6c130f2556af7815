"""What a probe is, and how long its questions are made: a draft grows part by part until its prompt has the length."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Asked:
    """A question and the answer that scores 1. ``depth`` says where in the prompt the answer stands, from 0 to 1."""

    prompt: str
    answer: str
    images: tuple[bytes, ...] = ()
    depth: float | None = None


@dataclass(frozen=True)
class Draft:
    """One question in every size: ``build(n)`` has n parts, from ``fewest`` to ``most``.

    The first n parts are the same in all sizes, so that each part makes the prompt longer.
    """

    fewest: int
    most: int
    build: Callable[[int], Asked]


@dataclass(frozen=True)
class Probe:
    """A kind of probe.

    ``draft(draw, number, length)`` drafts question ``number`` for about ``length`` units from ``draw`` alone.
    ``figures(expected, answer)`` scores one answer, each figure in [0, 1], the headline first. ``size`` counts a
    question's units, ``unit``, where those are not the prompt's tokens.
    """

    draft: Callable[[Random, int, int], Draft]
    figures: Callable[[str, str], dict[str, float]]
    size: Callable[[Asked], int] | None = None
    unit: str = "tokens"


def nearest(draft: Draft, length: int, size: Callable[[Asked], int]) -> int:
    """The number of parts whose question's size comes nearest to ``length``: by secants, then neighbours."""
    sizes = {draft.fewest: size(draft.build(draft.fewest))}
    parts = draft.fewest
    # at first an overestimate, as it has the instruction in it, so that the search comes from below
    each = sizes[parts] / parts
    while (gap := length - sizes[parts]) and (better := _within(parts + _step(gap / each), draft)) not in sizes:
        sizes[better] = size(draft.build(better))
        each = max(1.0, (sizes[better] - sizes[parts]) / (better - parts))
        parts = better
    return min(sizes, key=lambda n: abs(sizes[n] - length))


def _step(parts: float) -> int:
    """At least one part in its direction."""
    return round(parts) or (1 if parts > 0 else -1)


def _within(parts: int, draft: Draft) -> int:
    return min(max(parts, draft.fewest), draft.most)
