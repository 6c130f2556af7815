"""In float32, neither the batch nor the side of the padding changes an answer: over the demo's questions."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from jobs.demo.data import write_split
from jobs.stages import teacher_digests
from pipeline.data.collate import predicting_positions
from pipeline.data.encoding import Encoder
from pipeline.data.processors import Processor, load_processor
from pipeline.evaluation import Question, read_questions
from pipeline.generation import Generation, Prompt, generate, model_batch
from pipeline.models import load_model
from pipeline.ops.opset import TORCH
from pipeline.student import build_student
from schemas.config import EvaluateConfig, TeacherConfig
from schemas.layers import LayerPlan

TEACHER = TeacherConfig(path="jobs/demo/teacher")
LAYERS = 8
# Batches of which the numbers of questions are no multiples, so that the last one is a part.
BATCHES = (1, 7, 32)
# The last takes as long as the others together; test_decoders pads decoders of mixers alone.
PLANS = [(), (0, 4), pytest.param(tuple(range(LAYERS)), marks=pytest.mark.slow)]
CPU = torch.device("cpu")
Asked = tuple[Processor, list[Question]]


def asked_of(folder: Path, count: int) -> Asked:
    write_split(folder / "test.json", "test", count, seed=0)
    processor = load_processor(TEACHER)
    config = EvaluateConfig(data=str(folder / "test.json"), images=str(folder), group_by="family")
    return processor, read_questions(config, Encoder(processor, 128))


def model_of(replaced: tuple[int, ...]) -> PreTrainedModel:
    if not replaced:
        return load_model(TEACHER, torch.float32, CPU)
    plan = LayerPlan(LAYERS, replaced)
    return build_student(TEACHER, plan, "mimic", 0, torch.float32, CPU, TORCH, teacher_digests(TEACHER))


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    return asked_of(tmp_path_factory.mktemp("demo"), 60)


def answers(model: PreTrainedModel, asked: Asked, batch: int) -> list[str]:
    processor, questions = asked
    prompts = [Prompt(q.prompt, q.sample.images) for q in questions]
    return generate(model, processor, prompts, Generation(batch, 16))


@pytest.mark.parametrize("replaced", PLANS, ids=["teacher", "quarter", "all"])
def test_no_batch_size_changes_an_answer(asked: Asked, replaced: tuple[int, ...]) -> None:
    model = model_of(replaced)
    alone, *others = (answers(model, asked, batch) for batch in BATCHES)
    assert len(set(alone)) > 1, "answers that are all the same would show nothing"
    assert others == [alone] * len(others)


@pytest.mark.slow  # the demo's whole test set, half a minute a model and batch
@pytest.mark.parametrize("replaced", [(), (0, 4), (0, 2, 4, 6)], ids=["teacher", "quarter", "half"])
def test_no_batch_size_changes_an_answer_of_the_whole_demo(tmp_path: Path, replaced: tuple[int, ...]) -> None:
    model, asked = model_of(replaced), asked_of(tmp_path, 600)
    alone, *others = (answers(model, asked, batch) for batch in BATCHES)
    assert others == [alone] * len(others)


@torch.no_grad()
def choices(model: PreTrainedModel, asked: Asked, batch: int, *, left: bool) -> list[list[int]]:
    """The most probable token at every position that predicts an answer's, the reference being forced."""
    processor, questions = asked
    samples, found = [q.sample for q in questions], []
    for at in range(0, len(samples), batch):
        rows = samples[at : at + batch]
        logits = model(**model_batch(model, processor, [Prompt(r.input_ids, r.images) for r in rows], left=left)).logits
        for row, logits_LV in zip(rows, logits, strict=True):
            shift = logits_LV.shape[0] - len(row.input_ids) if left else 0
            found.append(logits_LV[torch.from_numpy(predicting_positions(row.spans)) + shift].argmax(-1).tolist())
    return found


@pytest.mark.parametrize("replaced", PLANS, ids=["teacher", "quarter", "all"])
def test_no_side_of_the_padding_changes_a_choice(asked: Asked, replaced: tuple[int, ...]) -> None:
    model = model_of(replaced)
    alone = choices(model, asked, 1, left=False)
    assert choices(model, asked, 64, left=True) == alone
    assert choices(model, asked, 64, left=False) == alone
