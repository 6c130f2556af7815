"""Probes: made from a seed, as long as asked by any tokenizer, and answerable from the prompt alone."""

import io
import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from pipeline.benchmarks.probes import needle, words
from pipeline.benchmarks.probes.make import expected, make
from pipeline.data.conversations import Conversation, Turn
from pipeline.data.encoding import Encoder
from pipeline.data.processors import load_processor
from schemas.config import TeacherConfig
from schemas.errors import ConfigInvalid
from schemas.probes import ProbeConfig, ProbeKind
from tests.pipeline.benchmarks.probes import KINDS, NOWHERE, TEXT, digest_of_all, probe, sized, values, whole_words
from tests.pipeline.benchmarks.solvers import SOLVERS, asked_for, half_blind, known_number, known_values, runs


def letters(text: str) -> int:
    """A tokenizer of bytes."""
    return len(text.encode())


def pieces(text: str) -> int:
    """A tokenizer that cuts words into pieces of up to three letters, has each digit alone, and begins with a mark."""
    return 1 + len(re.findall(r"[^\W\d]{1,3}|\d|[^\w\s]|\n", text))


COUNTERS = {whole_words: (160, 333, 1000), letters: (1000, 1777, 4000), pieces: (300, 555, 2000)}


@pytest.mark.parametrize("kind", TEXT)
@pytest.mark.parametrize("count", COUNTERS)
def test_prompts_have_their_length_within_five_percent(kind: ProbeKind, count: Callable[[str], int]) -> None:
    lengths = COUNTERS[count]
    items = make(ProbeConfig(kind=kind, lengths=lengths, questions=12), count).read(NOWHERE)
    for item in items:
        assert count(item.prompt) == pytest.approx(int(item.group or 0), rel=0.05)
    assert Counter(item.group for item in items) == {str(length): 12 for length in lengths}


def test_what_the_chat_template_adds_counts_where_the_counter_counts_it() -> None:
    encoder = Encoder(load_processor(TeacherConfig(path="jobs/demo/teacher")), 1 << 20)

    def count(text: str) -> int:
        return len(encoder.prompt_ids(Conversation("", "", (), (Turn("user", text),), {}), ()))

    assert count("one two") > len(encoder.tokenizer("one two").input_ids) == 2
    for kind in TEXT:
        task = make(ProbeConfig(kind=kind, lengths=(150, 400), questions=4), count)
        for item in task.read(NOWHERE):
            assert count(item.prompt) == pytest.approx(int(item.group or 0), rel=0.05)
            assert len(encoder.tokenizer(expected(item)).input_ids) < task.max_new_tokens


def test_pictures_have_as_many_words_as_asked() -> None:
    for item in probe("reading", (1, 5, 30), questions=2).read(NOWHERE):
        assert len(expected(item).split()) == int(item.group or 0)
        assert whole_words(item.prompt) < 40


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_take_turns_ids_differ_and_only_reading_has_pictures(kind: ProbeKind) -> None:
    items = probe(kind, sized(kind)).read(NOWHERE)
    assert len({item.id for item in items}) == len(items) == 20
    assert [item.group for item in items] == [str(length) for length in sized(kind)] * 10
    assert {len(item.images) for item in items} == {int(kind == "reading")}


@pytest.mark.parametrize("kind", KINDS)
def test_who_reads_the_prompt_answers_all(kind: ProbeKind) -> None:
    task = probe(kind, sized(kind))
    found = values(task, [SOLVERS[kind](item) for item in task.read(NOWHERE)])
    errors = {name for name in found if name.startswith("character_error_rate")}
    assert {name: found[name] for name in errors} == dict.fromkeys(errors, 0.0)
    assert {name: found[name] for name in found.keys() - errors} == dict.fromkeys(found.keys() - errors, 1.0)
    assert len(found.keys() - errors) >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_who_answers_another_question_scores_less(kind: ProbeKind) -> None:
    task = probe(kind, sized(kind))
    items = task.read(NOWHERE)
    # of the same length, so that only the content is wrong
    found = values(task, [expected(item) for item in [*items[2:], *items[:2]]])
    assert found["exact_match"] == 0
    assert next(iter(found.values())) < 0.2


@pytest.mark.parametrize(("kind", "figure"), [("mqar", "per_key"), ("phone_book", "exact_match")])
def test_who_forgets_the_first_half_knows_about_half(kind: ProbeKind, figure: str) -> None:
    task = probe(kind, (200, 800), questions=60)
    asked = [half_blind(item) for item in task.read(NOWHERE)]
    known = {"mqar": known_values, "phone_book": known_number}[kind]
    found = values(task, [known(item) for item in asked])
    # standard errors are at most 0.065 at a length
    assert all(0.3 < found[f"{figure}{part}"] < 0.7 for part in ("", "@200", "@800"))


def test_needles_stand_at_their_depths_which_take_turns() -> None:
    items = probe("needle", (400, 1000), questions=10).read(NOWHERE)
    for item in items:
        hay = item.prompt.split("\n\n")[1]
        before, after = hay.split(f"The secret number of the {asked_for(item)} is {expected(item)}.")
        # a haystack's sentences are alike in length, and the shorter one has some thirty
        assert len(before) / len(before + after) == pytest.approx(item.reference["depth"], abs=0.04)
    assert Counter((item.group, item.reference["depth"]) for item in items) == {
        (length, depth): 2 for length in ("400", "1000") for depth in needle.DEPTHS
    }


DIGEST = """
import sys
from tests.pipeline.benchmarks.probes import digest_of_all
print(digest_of_all(int(sys.argv[1])))
"""


def test_a_seed_gives_the_same_bytes_in_every_process() -> None:
    calls = [
        subprocess.Popen(
            [sys.executable, "-c", DIGEST, "7"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path.cwd())},
            stdout=subprocess.PIPE,
            text=True,
        )
        for hash_seed in ("1", "2")
    ]
    assert {call.communicate()[0].strip() for call in calls} == {digest_of_all(7)}


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_or_number_gives_other_questions(kind: ProbeKind) -> None:
    first, second = (probe(kind, sized(kind), seed=seed).read(NOWHERE) for seed in (0, 1))
    asked = [(item.prompt, item.pictures()) for item in [*first, *second]]
    assert len(set(asked)) == len(asked)


def test_pictures_are_square_in_several_sizes_of_letters_with_slight_noise() -> None:
    task = probe("reading", (24,), questions=3)
    for item in task.read(NOWHERE):
        grey = np.asarray(Image.open(io.BytesIO(item.pictures()[0])), np.float64)
        assert grey.shape[0] == grey.shape[1]
        paper = np.median(grey)
        assert 2 < np.std(grey[grey > paper - 25]) < 8
        # with tails a line is up to 1.35 times as high as without, so this takes two sizes
        heights = [stop - start for start, stop in runs((grey < paper / 2).any(1), 4)]
        assert len(heights) == 8
        assert max(heights) > 1.5 * min(heights)


@pytest.mark.parametrize("kind", TEXT)
@pytest.mark.parametrize("count", [whole_words, letters])
def test_too_small_a_length_names_the_smallest_which_fits(kind: ProbeKind, count: Callable[[str], int]) -> None:
    with pytest.raises(ConfigInvalid, match=rf"^probe {kind}: length 9: the nearest that can be made has \d+ ") as told:
        make(ProbeConfig(kind=kind, lengths=(9,), questions=20), count)
    smallest = int(re.findall(r"the smallest length that fits is (\d+)$", str(told.value))[0])
    onwards = tuple(range(smallest, smallest + 12))
    for item in make(ProbeConfig(kind=kind, lengths=onwards, questions=20), count).read(NOWHERE):
        assert count(item.prompt) == pytest.approx(int(item.group or 0), rel=0.05)
    with pytest.raises(ConfigInvalid, match="the smallest length that fits"):
        make(ProbeConfig(kind=kind, lengths=(round(0.85 * smallest),), questions=20), count)


@pytest.mark.parametrize(("kind", "length"), [("mqar", 200_000), ("phone_book", 200_000), ("reading", 500)])
def test_too_great_a_length_names_the_greatest(kind: ProbeKind, length: int) -> None:
    with pytest.raises(ConfigInvalid, match=rf"^probe {kind}: length {length}: the nearest .* has \d+ ") as told:
        probe(kind, (length,), questions=1)
    largest = int(re.findall(r"the largest length that fits is (\d+)$", str(told.value))[0])
    assert [item.group for item in probe(kind, (largest,), questions=1).read(NOWHERE)] == [str(largest)]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "mqar", "lengths": []}, "at least 1 item"),
        ({"kind": "mqar", "lengths": [128, 0]}, "greater than 0"),
        ({"kind": "mqar", "lengths": [128, 256, 128]}, "lengths names 128 more than once"),
        ({"kind": "mqar", "lengths": [128], "questions": 0}, "greater than or equal to 1"),
        ({"kind": "mqar", "lengths": [128], "keys": 3}, "Extra inputs"),
        ({"kind": "poem", "lengths": [128]}, "'mqar', 'needle'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ProbeConfig.model_validate(settings)


def test_no_word_is_twice_in_a_list_or_in_two_that_stand_together() -> None:
    lists = [words.ADJECTIVES, words.NOUNS, words.VALUES]
    assert len(set(itertools.chain(*lists))) == sum(map(len, lists))
    for names in (words.FIRST_NAMES, words.LAST_NAMES):
        assert len(set(names)) == len(names)
    assert all(re.fullmatch("[a-z]{2,8}", word) for word in itertools.chain(*lists))
