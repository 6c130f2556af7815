"""The demo task: scenes of real handwritten digits, and questions about them in words.

Owns what a scene looks like, which strokes belong to which split, and the six families of questions. Everything is a
pure function of (split, seed, index). The strokes are the 1,797 images of scikit-learn's ``load_digits``; they are
divided between the splits before any scene is drawn, so that no stroke of a test scene was ever seen in training.
"""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

Split = Literal["train", "val", "test"]

CANVAS = 64
COLOURS = {
    "red": (235, 50, 45),
    "green": (40, 200, 70),
    "blue": (60, 100, 255),
    "yellow": (245, 225, 60),
    "purple": (190, 70, 215),
    "white": (240, 240, 240),
}
# Shares of each class's strokes; 60/20/20 leaves about 36 strokes a class for the test scenes.
SPLIT_SHARES: dict[Split, tuple[float, float]] = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}
MAX_DIGITS = 6
# Sums of up to four digits stay below 37, so that every answer is one word of the vocabulary.
MAX_SUM_DIGITS = 4
# Centres closer than this (pixels) would make "left of" a matter of taste.
MIN_ORDER_GAP = 5


@dataclass(frozen=True)
class Digit:
    """One digit on the canvas: its value, its colour's name and its box (pixels)."""

    value: int
    colour: str
    left: int
    top: int
    size: int

    @property
    def x(self) -> float:
        """Horizontal centre."""
        return self.left + self.size / 2

    @property
    def y(self) -> float:
        """Vertical centre."""
        return self.top + self.size / 2


@dataclass(frozen=True)
class Scene:
    """A canvas and what stands on it, digits ordered from left to right."""

    digits: tuple[Digit, ...]
    image: Image.Image


@dataclass(frozen=True)
class Question:
    """One question about a scene with its only right answer."""

    family: str
    text: str
    answer: str


class Strokes:
    """The handwritten 8 × 8 images of one split, by class."""

    def __init__(self, split: Split) -> None:
        from sklearn.datasets import load_digits  # heavy, and only the demo needs it

        data = load_digits()
        low, high = SPLIT_SHARES[split]
        self.by_class: list[list[Image.Image]] = []
        for value in range(10):
            images = data.images[data.target == value]
            part = images[int(low * len(images)) : int(high * len(images))]
            self.by_class.append([Image.fromarray((i * (255 / 16)).astype(np.uint8)) for i in part])


def draw_scene(strokes: Strokes, rng: random.Random, count: int, *, augment: bool) -> Scene:
    """Draws ``count`` digits of varying colour, size and place on one canvas.

    ``augment`` bends the strokes by a random affine map, as for training; validation and test strokes stay as written.
    """
    values = [rng.randrange(10) for _ in range(count)]
    if count > 1 and rng.random() < 0.4:  # repeats, or counting would almost always answer 0 or 1
        values[rng.randrange(count)] = values[rng.randrange(count)]
    boxes = _place(rng, count)
    base = rng.randrange(0, 36)
    canvas = Image.new("RGB", (CANVAS, CANVAS), (base, base, base))
    digits = []
    for value, (left, top, size) in zip(values, boxes, strict=True):
        colour = rng.choice(list(COLOURS))
        stroke = _warp(rng.choice(strokes.by_class[value]), size, rng if augment else None)
        canvas.paste(COLOURS[colour], (left, top), stroke)
        digits.append(Digit(value, colour, left, top, size))
    return Scene(tuple(sorted(digits, key=lambda d: d.x)), canvas)


def _place(rng: random.Random, count: int) -> list[tuple[int, int, int]]:
    """Boxes (left, top, size) that barely touch, with distinct horizontal centres."""
    low, high = (16, 26) if count <= 3 else (14, 20)
    while True:
        boxes: list[tuple[int, int, int]] = []
        for _ in range(40):
            size = rng.randint(low, high)
            left, top = rng.randint(0, CANVAS - size), rng.randint(0, CANVAS - size)
            if all(_apart((left, top, size), other) for other in boxes):
                boxes.append((left, top, size))
                if len(boxes) == count:
                    return boxes


def _apart(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    dx, dy = abs(a[0] + a[2] / 2 - b[0] - b[2] / 2), abs(a[1] + a[2] / 2 - b[1] - b[2] / 2)
    # Strokes leave their box's margin empty, so boxes may overlap by a tenth.
    return dx >= MIN_ORDER_GAP and max(dx, dy) >= 0.45 * (a[2] + b[2])


def _warp(stroke: Image.Image, size: int, rng: random.Random | None) -> Image.Image:
    """The stroke at ``size`` × ``size``, rotated, sheared and stretched a little where a generator is given."""
    scale = 8 / size
    a, b, c, d = scale, 0.0, 0.0, scale
    if rng is not None:
        angle, shear = rng.uniform(-0.25, 0.25), rng.uniform(-0.2, 0.2)
        sx, sy = scale * rng.uniform(0.9, 1.15), scale * rng.uniform(0.9, 1.15)
        a, b, c, d = sx, sx * (shear - angle), sy * angle, sy
    centre = size / 2
    offset = 4.0 if rng is None else 4.0 + rng.uniform(-0.3, 0.3)
    matrix = (a, b, offset - (a + b) * centre, c, d, 4.0 - (c + d) * centre)
    return stroke.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


def _reading(digits: tuple[Digit, ...], rng: random.Random) -> Question | None:
    text = rng.choice(["read the digits from left to right", "which digits are there from left to right ?"])
    return Question("reading", text, " ".join(str(d.value) for d in digits))


def _counting(digits: tuple[Digit, ...], rng: random.Random) -> Question | None:
    value = rng.choice(digits).value if rng.random() < 0.8 else rng.randrange(10)
    text = rng.choice([f"how many digits are a {value} ?", f"how often is there a {value} ?"])
    return Question("counting", text, str(sum(d.value == value for d in digits)))


def _colour(digits: tuple[Digit, ...], rng: random.Random) -> Question | None:
    single = _unique(digits)
    if not single:
        return None
    digit = rng.choice(single)
    text = rng.choice([f"what colour is the {digit.value} ?", f"in which colour is the {digit.value} written ?"])
    return Question("colour", text, digit.colour)


def _neighbour(digits: tuple[Digit, ...], rng: random.Random) -> Question | None:
    """The next digit to the left, to the right or above a digit that occurs once."""
    single = _unique(digits)
    side = rng.choice(["left of", "right of", "above"])
    pairs: list[tuple[Digit, Digit]] = []
    order = sorted(digits, key=lambda d: d.y) if side == "above" else list(digits)
    for first, second in itertools.pairwise(order):
        if side == "above" and not _clearly_above(order, first, second):
            continue
        pairs.append((second, first) if side != "right of" else (first, second))
    pairs = [(asked, answer) for asked, answer in pairs if asked in single]
    if not pairs:
        return None
    asked, answer = rng.choice(pairs)
    text = rng.choice(
        [f"which digit is next {side} the {asked.value} ?", f"what is the first digit {side} the {asked.value} ?"]
    )
    return Question("neighbour", text, str(answer.value))


def _clearly_above(order: list[Digit], first: Digit, second: Digit) -> bool:
    """Whether ``first`` is the digit next above ``second`` by a margin that an eye would not dispute."""
    rank = order.index(first)
    return second.y - first.y >= MIN_ORDER_GAP and (rank == 0 or first.y - order[rank - 1].y >= MIN_ORDER_GAP)


def _largest(digits: tuple[Digit, ...], rng: random.Random) -> Question | None:
    largest = rng.random() < 0.5
    text = rng.choice(["what is the {} digit ?", "which digit is the {} ?"])
    answer = max(d.value for d in digits) if largest else min(d.value for d in digits)
    return Question("largest", text.format("largest" if largest else "smallest"), str(answer))


def _sum(digits: tuple[Digit, ...], rng: random.Random) -> Question | None:
    if not 2 <= len(digits) <= MAX_SUM_DIGITS:
        return None
    text = rng.choice(["what is the sum of the digits ?", "what do the digits add up to ?"])
    return Question("sum", text, str(sum(d.value for d in digits)))


def _unique(digits: tuple[Digit, ...]) -> list[Digit]:
    values = [d.value for d in digits]
    return [d for d in digits if values.count(d.value) == 1]


FAMILIES: dict[str, Callable[[tuple[Digit, ...], random.Random], Question | None]] = {
    "reading": _reading,
    "counting": _counting,
    "colour": _colour,
    "neighbour": _neighbour,
    "largest": _largest,
    "sum": _sum,
}


def draw_sample(strokes: Strokes, rng: random.Random, family: str, *, augment: bool) -> tuple[Scene, Question]:
    """One scene with one question of the family; scenes that do not admit the question are drawn again."""
    while True:
        low, high = (2, MAX_SUM_DIGITS) if family == "sum" else (1, MAX_DIGITS)
        scene = draw_scene(strokes, rng, rng.randint(low, high), augment=augment)
        question = FAMILIES[family](scene.digits, rng)
        if question is not None:
            return scene, question


def sample_rng(split: Split, seed: int, index: int) -> random.Random:
    """The generator of one sample: a sample depends on nothing but its split, the seed and its index."""
    return random.Random(f"{split}/{seed}/{index}")
