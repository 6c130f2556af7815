"""What an evaluation asks beyond the run's own questions: benchmarks and probes, their answers, figures and files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.benchmarks.probes.make import make
from pipeline.benchmarks.task import Item, Score, Task, recovery
from pipeline.benchmarks.tasks import read_items, task_of
from pipeline.data.conversations import Conversation, Turn
from pipeline.data.encoding import Encoder
from pipeline.stage import require
from pipeline.store import Store
from schemas.artifacts import ArtifactRef
from schemas.config import EvaluateConfig
from schemas.errors import ArtifactDrift, ConfigInvalid

# What the benchmarks' servers and graders take, by task and model.
SUBMISSIONS = "submissions"


@dataclass(frozen=True)
class Exam:
    """A task and those of its questions that are asked."""

    task: Task
    items: Sequence[Item]

    @property
    def answers_name(self) -> str:
        """Its file in the evaluation's artifact: one JSON line a question, with everyone's answer."""
        return f"answers-{self.task.name}.jsonl"


def exams(config: EvaluateConfig, encoder: Encoder) -> list[Exam]:
    """All that is asked, benchmarks first.

    Raises:
        SampleInvalid: a benchmark's files are not as published.
        ConfigInvalid: a probe's length cannot be made, or it has pictures and the teacher reads none.
    """

    def tokens_of(text: str) -> int:
        return len(encoder.prompt_ids(Conversation("probe", "", (), (Turn("user", text),), {}), ()))

    found = [Exam(task_of(benchmark), read_items(benchmark)) for benchmark in config.benchmarks]
    for probe in config.probes:
        if probe.kind == "reading" and encoder.processor.image_token_id is None:
            raise ConfigInvalid("evaluate.probes: reading: asks about pictures, but this teacher reads none")
        task = make(probe, tokens_of)
        found.append(Exam(task, task.read(Path())))
    return found


def keep_answers(store: Store, ref: ArtifactRef, exam: Exam, answers: Mapping[str, Sequence[str]]) -> None:
    """Writes everyone's answers, and what the benchmark's server takes of each model."""
    lines = [
        {"id": item.id, "group": item.group, **{who: said[number] for who, said in answers.items()}}
        for number, item in enumerate(exam.items)
    ]
    store.write(f"{ref}/{exam.answers_name}", "".join(json.dumps(line) + "\n" for line in lines).encode())
    for who, said in answers.items():
        for name, data in exam.task.files(exam.items, said).items():
            store.write(f"{ref}/{SUBMISSIONS}/{exam.task.name}/{who}/{name}", data)


def take_teacher(store: Store, ref: ArtifactRef, exam: Exam) -> list[str]:
    """The teacher's answers of a finished evaluation that asked the same.

    Raises:
        ArtifactMissing: it is unfinished.
        ArtifactDrift: it asked other questions.
    """
    require(store, ref)
    lines = [json.loads(line) for line in store.read(f"{ref}/{exam.answers_name}").splitlines()]
    if [line["id"] for line in lines] != [item.id for item in exam.items]:
        raise ArtifactDrift(f"evaluate.teacher: {store.path(str(ref))}: asked other questions of {exam.task.name}")
    return [line["teacher"] for line in lines]


def figures(exam: Exam, answers: Mapping[str, Sequence[str]]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """By model the figures of its answers, none where the labels are not public; and the student's recoveries."""
    scores: dict[str, dict[str, Score]] = {who: exam.task.score(exam.items, said) for who, said in answers.items()}
    values = {who: {name: score.estimate() for name, score in found.items()} for who, found in scores.items()}
    shares = {
        name: recovery(scores["student"][name], score)
        for name, score in scores["teacher"].items()
        if score.gain and name in scores["student"]
    }
    return values, shares
