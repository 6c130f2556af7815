"""The reference's recipe from the cache, against the reference's loop: teacher and student in one process, online."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pipeline.training.loop
from jobs.stages import layer_plan
from jobs.train import train_job, train_student
from pipeline.models import body, decoder, head, load_model
from pipeline.ops.opset import TORCH
from pipeline.student import build_student
from pipeline.surgery import mixers, trainable_names
from pipeline.taps import recorded
from pipeline.training.engine import Worker
from pipeline.training.schedule import learning_rate
from schemas.config import RunConfig
from tests.conftest import tiny_model
from tests.pipeline.test_training import WORKER, batches_of, make_cache
from tests.tolerances import FLOAT32_LOGITS, PARITY

STEPS, BATCH = 10, 4
PHASE = {
    "kind": "distill",
    "steps": STEPS,
    "batch": BATCH,
    "lr": 2e-4,
    "warmup_samples": 3 * BATCH,
    "decay_samples": 3 * BATCH,
    "weights": {"kl": 1, "layer": 1, "ce": 0},
}


@pytest.fixture
def run(run_of: Callable[..., RunConfig], tiny_teacher: Path, tmp_path: Path) -> RunConfig:
    """MaTVLM's losses on a teacher that runs in bfloat16, as there, so that the cache holds its states exactly."""
    model = tiny_model(seed=1)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    folder = tmp_path / "teacher"
    model.save_pretrained(folder)
    for file in tiny_teacher.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    return run_of(
        teacher={"path": str(folder)},
        student={"layers": {"list": [0, 2]}, "init": "matvlm"},
        cache={
            "targets": {"kind": "final_hidden"},
            "positions": "all",
            "taps": {"fraction": 1},
            "dtype": "bfloat16",
        },
        distill={"phases": [PHASE], "layer_loss": "frobenius", "reduction": "reference"},
        placement={"prepare": {"workers": 0}, "cache": {"batch": 1}, "distill": {"micro_batch": 1}},
    )


def online(run: RunConfig) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """MaTVLM's loop: loss and gradients of each step, before they are clipped.

    Micro-batches of one sample; KL with `batchmean`, a sum over all positions; the unsquared Frobenius norm of what
    each replaced layer does otherwise than the teacher's on the teacher's input; AdamW without decay on 1-D parameters.
    """
    teacher = load_model(run.teacher, torch.bfloat16, WORKER.device)
    plan = layer_plan(run)
    student = build_student(run.teacher, plan, "matvlm", 0, torch.float32, WORKER.device, TORCH)
    trained = {n: student.get_parameter(n).requires_grad_() for n in trainable_names(student)}
    groups = [[p for p in trained.values() if (p.dim() > 1) == decays] for decays in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.01}, {"params": groups[1], "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    batches, (phase,) = batches_of(run), run.distill.phases
    for step in range(STEPS):
        total = 0.0
        for row in batches.index.step_items("all", BATCH, 0, step):
            inputs = batches.batch(phase, row[None], True, batches.plan(phase, 0, step, 0, 1)[0][2]).inputs
            with torch.no_grad(), recorded(decoder(teacher).layers, plan.replaced) as taps:
                inputs16 = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
                states = body(teacher)(**inputs16, use_cache=False).last_hidden_state
                logp = torch.log_softmax(head(student)(states.float()), -1)
            logq = torch.log_softmax(head(student)(body(student)(**inputs, use_cache=False).last_hidden_state), -1)
            loss = torch.nn.functional.kl_div(logq, logp, log_target=True, reduction="batchmean")
            for layer, mixer in mixers(student).items():
                value_in, value_out = taps[layer]
                loss = loss + torch.norm(mixer(value_in.float())[0] - value_out.float(), p=2)
            (loss / BATCH).backward()
            total += float(loss.detach()) / BATCH
        yield total, {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}
        torch.nn.utils.clip_grad_norm_(trained.values(), 0.1)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(phase.schedule(0), step)
        optimizer.step()
        optimizer.zero_grad()


def cached(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, dict[str, Tensor]]]:
    """Loss and gradients of each step of this repository's training."""
    steps: list[tuple[float, dict[str, Tensor]]] = []
    make_engine = pipeline.training.loop.make_engine

    def spied(*args: Any, **kwargs: Any) -> Any:
        engine, losses = make_engine(*args, **kwargs), []
        accumulate, step = engine.accumulate, engine.step
        trained: dict[str, torch.nn.Parameter] = engine.trained

        def note(batch: Any, *, last: bool) -> dict[str, Tensor]:
            metrics = accumulate(batch, last=last)
            losses.append(float(metrics["loss"]))
            return metrics

        def end(lr: float) -> float:
            steps.append((sum(losses), {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}))
            losses.clear()
            return step(lr)

        engine.accumulate, engine.step = note, end
        return engine

    monkeypatch.setattr(pipeline.training.loop, "make_engine", spied)
    train_student(train_job(run, "f" * 32), Worker(0, 1, torch.device("cpu")), lambda _: None)
    return steps


def test_first_ten_steps_from_the_cache_are_those_of_the_online_loop(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cache(run)
    mine, theirs = cached(run, monkeypatch), list(online(run))
    assert len(mine) == len(theirs) == STEPS
    apart: list[float] = []
    for (loss, gradients), (reference, expected) in zip(mine, theirs, strict=True):
        assert gradients.keys() == expected.keys()
        apart.append(abs(loss - reference) / reference)
        whole = sum(float(g.square().sum()) for g in expected.values()) ** 0.5
        difference = sum(float((gradients[n] - g).square().sum()) for n, g in expected.items()) ** 0.5
        apart.append(difference / whole)
    print(f"largest relative difference of a loss {max(apart[::2]):.1e}, of a gradient {max(apart[1::2]):.1e}")
    assert max(apart) <= PARITY
    assert theirs[-1][0] < theirs[0][0]


@torch.no_grad()
def test_layer_outputs_differ_by_what_mixer_and_attention_do(run: RunConfig) -> None:
    """MaTVLM compares whole layers; residual, norm and feed-forward are the same in both and fall out."""
    teacher = load_model(run.teacher, torch.float32, WORKER.device)
    student = build_student(run.teacher, layer_plan(run), "matvlm", 0, torch.float32, WORKER.device, TORCH)
    layers: Any = decoder(teacher).layers
    state = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(0))
    rotary = decoder(teacher).rotary_emb(state, torch.arange(12)[None])  # type: ignore[operator]
    for index, mixer in mixers(student).items():
        found = []
        with recorded(layers, (index,)) as taps:
            for layer in (decoder(student).layers[index], layers[index]):  # type: ignore[index]
                out = layer(state, position_embeddings=rotary)
                found.append(out[0] if isinstance(out, tuple) else out)
        value_in, value_out = taps[index]
        torch.testing.assert_close(
            found[0] - found[1], mixer(value_in)[0] - value_out, rtol=FLOAT32_LOGITS, atol=FLOAT32_LOGITS
        )
