"""The shipped teacher on real test scenes: it answers, and its attention layers are needed for that."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.demo.data import write_split
from pipeline.capture import PreparedSample, Teacher
from pipeline.data.collate import image_features, model_inputs, pad_tokens, target_positions
from pipeline.data.encoding import Encoder
from pipeline.data.processors import load_processor
from pipeline.evaluation import Question, answer, read_questions, score
from pipeline.hub import as_teacher
from pipeline.losses import full_kl, target_kl
from pipeline.models import body, decoder, head, load_model
from pipeline.ops.opset import TORCH
from pipeline.student import build_student
from pipeline.taps import recorded
from pipeline.targets import decode
from schemas.config import CacheConfig, EvaluateConfig, SampledTargets
from schemas.layers import LayerPlan
from schemas.placement import CachePlacement
from tests.bench.initialisation import error
from tests.tolerances import FLOAT32_LOGITS

TEACHER = "jobs/demo/teacher"


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    folder = tmp_path_factory.mktemp("test")
    write_split(folder / "test.json", "test", 96, seed=1)
    config = EvaluateConfig(data=str(folder / "test.json"), images=str(folder), group_by="family")
    return read_questions(config, Encoder(load_processor(TEACHER), 128))


def exact_match(model: torch.nn.Module, questions: list[Question]) -> float:
    found = answer(model, load_processor(TEACHER), questions, 48, 16, lambda _: None)  # type: ignore[arg-type]
    value: float = score(questions, found.texts)["overall"]["value"]
    return value


def test_teacher_answers_and_the_untrained_hybrid_falls_to_half_at_most(questions: list[Question]) -> None:
    cpu = torch.device("cpu")
    teacher = exact_match(load_model(TEACHER, torch.float32, cpu), questions)
    # the card says 95.6 %; five standard deviations of 96 answers below that is 85 %
    assert teacher >= 0.85
    student = build_student(TEACHER, LayerPlan(8, (0, 4)), "mimic", 0, torch.float32, cpu, TORCH)
    assert exact_match(student, questions) <= teacher / 2


@torch.no_grad()
def test_mimic_starts_nearer_to_the_teacher_than_matvlm_in_every_layer(questions: list[Question]) -> None:
    model = load_model(TEACHER, torch.float32, torch.device("cpu"))
    rows = [q.sample for q in questions[:48]]
    ids, mask = pad_tokens([row.input_ids for row in rows], 0)
    processor = load_processor(TEACHER)
    features = [image_features(processor, row.images) for row in rows]
    layers: Any = decoder(model).layers
    with recorded(layers, tuple(range(8))) as taps:
        inputs = model_inputs(ids, features, processor.image_token_id)
        body(model)(**inputs, attention_mask=mask, use_cache=False)
    for i, (value_in, value_out) in taps.items():
        pairs = [
            (u[: len(row.input_ids)], a[: len(row.input_ids)])
            for u, a, row in zip(value_in, value_out, rows, strict=True)
        ]
        fit, held_out = pairs[:16], pairs[16:]
        from_taps, from_weights, matvlm = (
            error(layers[i].self_attn, init, 0, gains, held_out)
            for init, gains in (("mimic", fit), ("mimic", []), ("matvlm", []))
        )
        assert from_taps < 1 < matvlm
        assert from_taps < from_weights < matvlm


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_mean_gradient_of_the_cached_draws_converges_to_that_of_the_whole_distribution(
    questions: list[Question], temperature: float
) -> None:
    seeds, draws = 64, 50
    processor, rows, z = load_processor(TEACHER), [q.sample for q in questions[:6]], []
    samples = [PreparedSample(row, image_features(processor, row.images)) for row in rows]
    config = CacheConfig(targets=SampledTargets(draws=draws, temperature=temperature), positions="text")
    teacher = Teacher(as_teacher(TEACHER), config, (), "cpu", CachePlacement(batch=6))
    with torch.no_grad():
        hidden_BLD = body(teacher.model)(**teacher.inputs(samples), use_cache=False).last_hidden_state
        for row, s in zip(hidden_BLD, samples, strict=True):
            places = target_positions("text", s.sample.spans, s.sample.input_ids, processor.image_token_id)
            z.append(head(teacher.model)(row[torch.from_numpy(places)]))
    logits = torch.cat(z)
    student = (logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))).requires_grad_()
    loss = temperature**2 * full_kl(logits / temperature, student / temperature).sum()
    (exact,) = torch.autograd.grad(loss, student)
    mean = torch.zeros_like(exact)
    for seed in range(seeds):
        teacher.config = config.model_copy(update={"seed": seed})
        columns = teacher.capture(samples)
        found = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        sampled = target_kl(student, torch.nn.Identity(), decode(config.targets, found), temperature)
        mean += torch.autograd.grad(sampled, student)[0] / seeds
    # The gradient is T (q - count / N), so its mean's error is that of shares estimated from n draws (Bernstein 1924)
    n, p = seeds * draws, torch.softmax(logits / temperature, -1)
    chance = math.log(2 * p.numel() / 1e-6)  # all entries hold together but once in a million
    bound = chance / (3 * n) + ((chance / (3 * n)) ** 2 + 2 * p * (1 - p) * chance / n).sqrt()
    off = (mean - exact) / temperature
    assert (off.abs() <= bound + FLOAT32_LOGITS).all()
    # and as a whole it is what n draws leave, no more: over a thousand positions the sum strays by some per cent
    assert float(off.square().sum() / (p * (1 - p) / n).sum()) == pytest.approx(1, abs=0.25)


def test_group_that_records_lack_is_named(tmp_path: Path) -> None:
    from schemas.errors import SampleInvalid

    write_split(tmp_path / "test.json", "test", 1, seed=1)
    records = json.loads((tmp_path / "test.json").read_text())
    (tmp_path / "test.json").write_text(json.dumps([{k: v for k, v in records[0].items() if k != "family"}]))
    config = EvaluateConfig(data=str(tmp_path / "test.json"), images=str(tmp_path), group_by="family")
    with pytest.raises(SampleInvalid, match="record test-000000: has no field `family`"):
        read_questions(config, Encoder(load_processor(TEACHER), 128))
