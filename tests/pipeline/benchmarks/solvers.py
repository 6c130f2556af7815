"""What reads a probe's question and answers it: the knowledge that a model needs, and no more.

The picture's reader knows the font and the list of words.
"""

import functools
import io
import itertools
import re
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.benchmarks.probes import copying, reading, words
from pipeline.benchmarks.probes.make import expected
from pipeline.benchmarks.task import Item
from schemas.probes import ProbeKind


def solve_mqar(item: Item) -> str:
    known = dict(re.findall(r"^(\w+ \w+): (\w+)$", item.prompt, re.MULTILINE))
    asked = item.prompt.rpartition(": ")[2].split(", ")
    assert len(asked) == 4
    return " ".join(known[name] for name in asked)


def solve_needle(item: Item) -> str:
    asked = re.search(r"What is the secret number of the (.+)\?", item.prompt)
    found = asked and re.search(rf"The secret number of the {asked[1]} is (\d+)\.", item.prompt)
    assert found
    return found[1]


def solve_phone_book(item: Item) -> str:
    asked = re.search(r"What is the phone number of (.+)\?", item.prompt)
    found = asked and re.findall(rf"^{asked[1]}: (.+)$", item.prompt, re.MULTILINE)
    assert found
    assert len(found) == 1
    return str(found[0])


def solve_copying(item: Item) -> str:
    return item.prompt.rpartition("\n")[2]


def solve_reading(item: Item) -> str:
    (picture,) = item.pictures()
    grey = np.asarray(Image.open(io.BytesIO(picture)), np.float64)
    ink = grey < (np.median(grey) + grey.min()) / 2
    said = []
    for top, bottom in runs(ink.any(1), 4):
        # letters stand closer together than half a line's height, words do not
        for left, right in runs(ink[top:bottom].any(0), (bottom - top) // 2):
            said.append(recognised(ink[top:bottom, left:right]))
    return " ".join(said)


SOLVERS: dict[ProbeKind, Callable[[Item], str]] = {
    "mqar": solve_mqar,
    "needle": solve_needle,
    "phone_book": solve_phone_book,
    "copying": solve_copying,
    "reading": solve_reading,
}


def runs(marked: np.ndarray, gap: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of marked places that are at most ``gap`` apart."""
    places = np.flatnonzero(marked)
    for group in np.split(places, np.flatnonzero(np.diff(places) > gap) + 1):
        yield int(group[0]), int(group[-1]) + 1


def tight(ink: np.ndarray) -> np.ndarray:
    (top, bottom), (left, right) = (next(runs(ink.any(axis), max(ink.shape))) for axis in (1, 0))
    return ink[top:bottom, left:right]


@functools.cache
def shapes() -> dict[tuple[int, ...], list[tuple[str, np.ndarray]]]:
    """Every word in every size, by height and width."""
    found: dict[tuple[int, ...], list[tuple[str, np.ndarray]]] = {}
    for font in [ImageFont.load_default(size) for size in reading.SIZES]:
        for word in copying.WORDS:
            image = Image.new("L", (max(reading.SIZES) * len(word), 2 * max(reading.SIZES)), 255)
            ImageDraw.Draw(image).text((0, 0), word, 0, font)
            shape = tight(np.asarray(image) < 128)
            found.setdefault(shape.shape, []).append((word, shape))
    return found


def recognised(ink: np.ndarray) -> str:
    """The word that looks most like it; noise may have moved the edges by a pixel."""
    seen = tight(ink)
    shifts = list(itertools.product((-1, 0, 1), repeat=2))

    def unlike(shape: np.ndarray) -> int:
        whole = np.maximum(shape.shape, seen.shape)
        one, other = (np.pad(x, [(1, 1 + w - n) for w, n in zip(whole, x.shape, strict=True)]) for x in (shape, seen))
        return min(int((np.roll(one, shift, (0, 1)) != other).sum()) for shift in shifts)

    near = [found for y, x in shifts for found in shapes().get((seen.shape[0] + y, seen.shape[1] + x), [])]
    return min(near, key=lambda found: unlike(found[1]))[0]


def half_blind(item: Item) -> Item:
    """The question with the first half of its lines forgotten."""
    lines = item.prompt.split("\n")
    return Item(item.id, "\n".join(lines[len(lines) // 2 :]), item.images, item.reference, item.group)


def known_values(item: Item) -> str:
    known = dict(re.findall(r"^(\w+ \w+): (\w+)$", item.prompt, re.MULTILINE))
    wrong = next(v for v in words.VALUES if v not in expected(item).split())
    return " ".join(known.get(name, wrong) for name in item.prompt.rpartition(": ")[2].split(", "))


def known_number(item: Item) -> str:
    try:
        return solve_phone_book(item)
    except AssertionError:
        return ""


def asked_for(item: Item) -> str:
    return re.findall(r"secret number of the (.+)\?", item.prompt)[0]
