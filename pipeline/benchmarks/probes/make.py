"""Probes as tasks: their questions from a seed in lengths by the model's own tokenizer, and their figures by length."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from random import Random

import numpy as np

from pipeline.benchmarks.probes import copying, needle, reading, recall
from pipeline.benchmarks.probes.draft import Asked, Draft, Probe, nearest
from pipeline.benchmarks.probes.reading import ERROR_RATE
from pipeline.benchmarks.task import Item, Score, Task, accuracy
from schemas.errors import ConfigInvalid
from schemas.probes import ProbeConfig, ProbeKind

PROBES: dict[ProbeKind, Probe] = {
    "mqar": Probe(recall.draft, recall.figures),
    "needle": Probe(needle.needle, needle.needle_figures),
    "phone_book": Probe(needle.phone_book, needle.phone_figures),
    "copying": Probe(copying.draft, copying.figures),
    "reading": Probe(reading.draft, reading.figures, reading.words_of, "words"),
}
# How far a question's length may be from what was asked for. Parts are less than a tenth of the smallest prompts, so
# that one more or fewer comes as close.
TOLERANCE = 0.05
# Tokens beside the answer's own: its end, and a few words around it.
ROOM = 16
# Tokens of a user's turn, with what the chat template puts around it if that is to count.
Count = Callable[[str], int]


def make(config: ProbeConfig, tokens_of: Count) -> Task:
    """The probe as a task, whose ``read`` needs no folder.

    Its items are ``questions`` of each length, the lengths taking turns; ``group`` is the length. A needle's reference
    is ``{"answer", "depth"}``, any other the answer's text. Figures are a mean over lengths, then ``FIGURE@LENGTH``,
    then for the needle ``FIGURE@LENGTH/DEPTH%``.

    Raises:
        ConfigInvalid: no question of a length can be made; says the smallest or largest that can.
    """
    maker = Maker(config, tokens_of)
    items = list(maker.items())
    room = max(tokens_of(expected(item)) for item in items) + ROOM

    def score(items: Sequence[Item], answers: Sequence[str]) -> dict[str, Score]:
        return scores(maker.probe, items, answers)

    return Task(config.kind, room, lambda _folder: items, score)


def expected(item: Item) -> str:
    """The answer that scores 1."""
    return item.reference["answer"] if isinstance(item.reference, dict) else item.reference


def scores(probe: Probe, items: Sequence[Item], answers: Sequence[str]) -> dict[str, Score]:
    """The figures of answers, as ``make`` says."""
    rows = [probe.figures(expected(item), answer) for item, answer in zip(items, answers, strict=True)]
    figures = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    lengths = np.array([int(item.group or 0) for item in items])
    found = {
        name: Score(np.column_stack([values, lengths]), over_lengths, gain=name != ERROR_RATE)
        for name, values in figures.items()
    }
    for part, inside in _parts(items).items():
        found |= {
            f"{name}@{part}": replace(accuracy(values[inside].tolist()), gain=name != ERROR_RATE)
            for name, values in figures.items()
        }
    return found


def over_lengths(units_UC: np.ndarray) -> float:
    """The mean over lengths (second column) of the mean of the first column at each."""
    values, lengths = units_UC.T
    return float(np.mean([values[lengths == length].mean() for length in np.unique(lengths)]))


def _parts(items: Sequence[Item]) -> dict[str, list[int]]:
    """The items of each length, and then of each length and depth, by number."""
    found: dict[str, list[int]] = {}
    for number, item in enumerate(items):
        found.setdefault(str(item.group), []).append(number)
    for number, item in enumerate(items):
        if isinstance(item.reference, dict):
            found.setdefault(f"{item.group}/{item.reference['depth']:.0%}", []).append(number)
    return found


class Maker:
    """Makes one probe's questions. A question depends on nothing but kind, seed, length and its number."""

    def __init__(self, config: ProbeConfig, tokens_of: Count) -> None:
        self.config, self.tokens_of = config, tokens_of
        self.probe = PROBES[config.kind]

    def items(self) -> Iterator[Item]:
        """All questions, the lengths taking turns, so that any first part of them has all lengths."""
        for number in range(self.config.questions):
            for length in self.config.lengths:
                yield self._item(number, length)

    def _item(self, number: int, length: int) -> Item:
        kind, draft = self.config.kind, self._draft(number, length)
        asked = draft.build(nearest(draft, length, self._size))
        if abs((size := self._size(asked)) - length) > TOLERANCE * length:
            raise ConfigInvalid(
                f"probe {kind}: length {length}: the nearest that can be made has {size} {self.probe.unit}; "
                + self._remedy(size, length)
            )
        reference = asked.answer if asked.depth is None else {"answer": asked.answer, "depth": asked.depth}
        return Item(f"{kind}-{length}-{number}", asked.prompt, asked.images, reference, str(length))

    def _draft(self, number: int, length: int) -> Draft:
        config = self.config
        return self.probe.draft(Random(f"{config.kind}/{config.seed}/{length}/{number}"), number, length)

    def _size(self, asked: Asked) -> int:
        return self.probe.size(asked) if self.probe.size else self.tokens_of(asked.prompt)

    def _remedy(self, size: int, length: int) -> str:
        if size < length:
            return f"the largest length that fits is {size}"
        return f"the smallest length that fits is {self._smallest(length)}"

    def _smallest(self, length: int) -> int:
        """The first length from this one on at which the smallest prompts of all questions have room."""
        while (least := max(map(self._least, range(self.config.questions), repeat(length)))) > length:
            length = least
        return length

    def _least(self, number: int, length: int) -> int:
        draft = self._draft(number, length)
        return self._size(draft.build(draft.fewest))
