"""Probes for tests, of few short questions, and a digest of all that one is; imported by bare processes."""

import hashlib
import re
from pathlib import Path

from pipeline.benchmarks.probes.make import make
from pipeline.benchmarks.task import Task
from schemas.probes import ProbeConfig, ProbeKind

TEXT: list[ProbeKind] = ["mqar", "needle", "phone_book", "copying"]
KINDS: list[ProbeKind] = [*TEXT, "reading"]
NOWHERE = Path("no such folder")


def whole_words(text: str) -> int:
    """A tokenizer of words and marks."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def probe(kind: ProbeKind, lengths: tuple[int, ...], questions: int = 10, seed: int = 0) -> Task:
    return make(ProbeConfig(kind=kind, lengths=lengths, questions=questions, seed=seed), whole_words)


def sized(kind: ProbeKind) -> tuple[int, ...]:
    return (2, 9) if kind == "reading" else (200, 400)


def values(task: Task, answers: list[str]) -> dict[str, float]:
    items = task.read(NOWHERE)
    return {name: score.estimate()["value"] for name, score in task.score(items, answers).items()}


def digest_of_all(seed: int) -> str:
    found = hashlib.sha256()
    for kind in KINDS:
        for item in probe(kind, sized(kind), questions=3, seed=seed).read(NOWHERE):
            found.update(repr((item.id, item.prompt, item.reference, item.group)).encode())
            found.update(b"".join(item.pictures()))
    return found.hexdigest()
