"""Reading words off a picture: text in several lines and sizes, drawn by Pillow with the font that it brings.

Hybrids lose on text in images first (OCRBench, TextVQA). The words are random, so that a language model cannot guess
what it does not see. The bytes depend on the seed and on Pillow's version, which holds the font.
"""

import io
import math
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.benchmarks.probes.copying import WORDS
from pipeline.benchmarks.probes.draft import Asked, Draft

PROMPT = (
    "Write out the words in the picture, from left to right and from top to bottom, separated by blanks. "
    "Write nothing else."
)
ERROR_RATE = "character_error_rate"
# Beyond it a letter has under five of the 384 pixels that a vision tower commonly has across.
MOST = 400
# Pixels; a line is in one size.
SIZES = (18, 22, 26, 32)
MARGIN = 8
# How much wider a word with its blank is than a line is high, of which follows how many words make a square.
ASPECT = 2.2
# Grey levels out of 255: dark on light, with noise far below the difference.
INK, PAPER, NOISE = (0, 60), (200, 250), 4.0


def draft(draw: Random, _number: int, length: int) -> Draft:
    """A picture with so many words."""
    most = min(max(length, 1), MOST)
    words = draw.choices(WORDS, k=most)
    look = draw.getrandbits(64)

    def build(count: int) -> Asked:
        return Asked(PROMPT, " ".join(words[:count]), (picture(words[:count], Random(look)),))

    return Draft(1, most, build)


def words_of(asked: Asked) -> int:
    """How many words are on the picture."""
    return len(asked.answer.split())


def picture(words: list[str], draw: Random) -> bytes:
    """The words as a square PNG in grey, which no vision tower needs to distort."""
    across = max(1, round(math.sqrt(len(words) / ASPECT)))
    ink, paper = draw.randint(*INK), draw.randint(*PAPER)
    lines = [words[at : at + across] for at in range(0, len(words), across)]
    loaded = [ImageFont.load_default(size) for size in SIZES]
    fonts = [draw.choice(loaded) for _ in lines]
    boxes, side = _places(lines, fonts)
    image = Image.new("L", (side, side), paper)
    pen = ImageDraw.Draw(image)
    for line, font, places in zip(lines, fonts, boxes, strict=True):
        for word, place in zip(line, places, strict=True):
            pen.text(place, word, ink, font)
    noise = np.random.default_rng(draw.getrandbits(64)).normal(0.0, NOISE, (side, side))
    grey = np.clip(np.rint(np.asarray(image, np.float64) + noise), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "PNG")
    return file.getvalue()


def _places(
    lines: list[list[str]], fonts: list[ImageFont.FreeTypeFont | ImageFont.ImageFont]
) -> tuple[list[list[tuple[int, int]]], int]:
    """Each word's place (left, top) in whole pixels, and the side of the square that holds them all."""
    places: list[list[tuple[int, int]]] = []
    top, right = MARGIN, 0
    for line, font in zip(lines, fonts, strict=True):
        # "Ag" reaches from the highest letter's top to the lowest one's bottom
        height, blank = math.ceil(font.getbbox("Ag")[3]), math.ceil(font.getlength("n"))
        left, found = MARGIN, []
        for word in line:
            found.append((left, top))
            left += math.ceil(font.getlength(word)) + blank
        places.append(found)
        top, right = top + height + height // 4, max(right, left - blank)
    return places, max(top, right) + MARGIN


def figures(expected: str, answer: str) -> dict[str, float]:
    """``exact_match`` up to blanks, and ``character_error_rate``: edits a character of the text, at most 1.

    At 1 an answer is worth as much as none; lower is better.
    """
    said = " ".join(answer.split())
    rate = min(1.0, edits(expected, said) / len(expected))
    return {"exact_match": float(said == expected), ERROR_RATE: rate}


def edits(text: str, other: str) -> int:
    """Insertions, deletions and substitutions of characters between two texts (Levenshtein 1966)."""
    letters = np.array([ord(letter) for letter in other], np.int64)
    steps = np.arange(len(other) + 1)
    row = steps
    for number, letter in enumerate(text, 1):
        changed = np.minimum(row[:-1] + (letters != ord(letter)), row[1:] + 1)
        # an insertion adds 1 a column, so its minimum over all columns before is a running one of what is left of that
        row = np.minimum.accumulate(np.concatenate([[number], changed]) - steps) + steps
    return int(row[-1])
