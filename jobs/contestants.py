"""Whom ``decant bench`` measures: teacher and student of a run, of folders, or random ones of a configuration."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PhiConfig, PreTrainedModel

from jobs.evaluate import evaluate_job, load_student
from jobs.stages import open_store
from jobs.train import WEIGHTS
from pipeline.initialise import initialise
from pipeline.models import build_model, load_config, load_model, pick_device
from pipeline.ops.backends import resolve
from pipeline.stage import read_record
from pipeline.student import build_student, has_bias, load_hybrid
from pipeline.surgery import mixers, replace_layers
from schemas.config import RunConfig
from schemas.errors import ConfigInvalid
from schemas.layers import LayersConfig, plan_layers
from schemas.sections import Backend, Init

# As transformers draws weights; what is drawn does not change how long a product takes.
SPREAD = 0.02
# Configurations that need no folder. Phi-2 is the decoder of TinyLLaVA-Phi-2, the paper's teacher (2.78 B parameters).
NAMED: dict[str, Callable[[], Any]] = {
    "phi-2": lambda: PhiConfig(
        vocab_size=51200,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        partial_rotary_factor=0.4,
    )
}
Who = Literal["teacher", "student"]


@dataclass(frozen=True)
class Contestant:
    """One model to measure: whose part it plays, where its weights are from, and how it is made on a device."""

    who: Who
    weights: str
    load: Callable[[torch.dtype, torch.device], PreTrainedModel]


def chosen(
    run: RunConfig | None, model: str | None, student: str | None, ratio: float | None, seed: int, *, random: bool
) -> tuple[list[Contestant], torch.device]:
    """Who is measured, and where: by a run, or by folders.

    Raises:
        ConfigInvalid: what was given does not go together, or cannot be read.
    """
    if run is not None:
        if model is not None or student is not None or ratio is not None:
            raise ConfigInvalid(
                "bench: a run file says which teacher, student and layers; leave out --model, --student and --ratio "
                "(--set student.layers.ratio=0.5 overrides the run's)"
            )
        return of_run(run, seed, random=random), pick_device(run.placement.device)
    if model is None:
        raise ConfigInvalid("bench: neither a run file nor --model; give `decant bench RUN.yaml` or `--model FOLDER`")
    return of_folders(model, student, ratio, seed, random=random), pick_device("auto")


def of_run(run: RunConfig, seed: int, *, random: bool) -> list[Contestant]:
    """The run's teacher and student, the latter trained where ``distill`` has finished.

    With ``random`` weights the teacher's configuration is all that is read.

    Raises:
        ConfigInvalid: the teacher cannot be read, or its layers cannot be replaced.
    """
    if random:
        config = load_config(run.teacher)
        return drawn(config, run.student.layers, run.student.init, run.placement.backend, seed)
    done = read_record(open_store(run), run.ref("distill")) is not None
    teacher = Contestant("teacher", run.teacher.path, partial(load_model, run.teacher))
    weights = str(run.ref("distill")) if done else f"{run.student.init} start, not trained"
    student = partial(load_student, evaluate_job(run), WEIGHTS if done else None)
    return [teacher, Contestant("student", weights, student)]


def of_folders(model: str, student: str | None, ratio: float | None, seed: int, *, random: bool) -> list[Contestant]:
    """A teacher's folder (or name on the hub, or named configuration) and an exported student's.

    Without a ``student`` it is the teacher with the share ``ratio`` of its layers replaced, evenly, and not trained.

    Raises:
        ConfigInvalid: what was given does not go together, or cannot be read.
    """
    named = model in NAMED and not Path(model).exists()
    if named and not random:
        raise ConfigInvalid(f"--model {model}: is a configuration without weights; add --random, or give a folder")
    if student is not None and (random or ratio is not None):
        raise ConfigInvalid("--student: has its own weights and layers; leave out --random and --ratio")
    if ratio is not None and not 0 < ratio <= 1:
        raise ConfigInvalid(f"--ratio {ratio:g}: is no share of the layers; give a number above 0 and at most 1")
    layers = LayersConfig(ratio=ratio or 0.25)
    if random:
        return drawn(NAMED[model]() if named else load_config(model), layers, "mimic", "auto", seed)
    teacher = Contestant("teacher", model, partial(load_model, model))
    if student is not None:
        return [teacher, Contestant("student", student, partial(load_hybrid, student))]
    return [teacher, Contestant("student", "mimic start, not trained", partial(_student_from, model, layers, seed))]


def _student_from(
    model: str, layers: LayersConfig, seed: int, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    plan = plan_layers(layers, load_config(model).get_text_config().num_hidden_layers)
    return build_student(model, plan, "mimic", seed, dtype, device, resolve("auto", device))


def drawn(config: Any, layers: LayersConfig, init: Init, backend: Backend, seed: int) -> list[Contestant]:
    """Teacher and student of a configuration; ``init`` decides whether the mixers have biases."""
    plan, weights = plan_layers(layers, config.get_text_config().num_hidden_layers), f"random, seed {seed}"

    def teacher(dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        return random_model(config, seed, dtype, device)

    def student(dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        model, generator = teacher(dtype, device), torch.Generator().manual_seed(seed)
        removed = replace_layers(model, plan, bias=has_bias(init), ops=resolve(backend, device))
        for index, attention in removed.items():
            initialise(mixers(model)[index], attention, "random", generator)
        return model.requires_grad_(False)

    return [Contestant("teacher", weights, teacher), Contestant("student", weights, student)]


@torch.no_grad()
def random_model(config: Any, seed: int, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model of the configuration: normal matrices, biases of 0 and norms of 1. Reads no file."""
    with device:
        model = build_model(config, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, SPREAD, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model
