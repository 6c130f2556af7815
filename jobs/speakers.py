"""Whom ``decant generate`` asks: the teacher or exported student of a folder, or a run's teacher or trained student."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from jobs.options import load
from pipeline.hub import folder_of
from pipeline.models import load_model, pick_device
from pipeline.stage import require
from pipeline.student import is_exported, load_hybrid
from schemas.config import TeacherConfig, TemplateName
from schemas.errors import ConfigInvalid
from schemas.sections import Backend, Device

Which = Literal["teacher", "student"]
RUN_FILES = (".yaml", ".yml")


@dataclass(frozen=True)
class Speaker:
    """A model to be asked, where it computes, and the files and template by which it reads text and images."""

    name: str
    reads: TeacherConfig
    template: TemplateName
    device: torch.device
    load: Callable[[torch.dtype, torch.device], PreTrainedModel]


@dataclass(frozen=True)
class Choices:
    """What the command line says of the model, None where it leaves the choice."""

    which: Which | None
    overrides: Sequence[str]
    template: TemplateName | None
    device: Device | None
    backend: Backend | None


def speaker(model: str, choices: Choices) -> Speaker:
    """The model of a folder, of a name on the hub, or of a run file; its weights are not read yet.

    Raises:
        ConfigInvalid: it is none of these, or the choices do not go with it.
        ArtifactMissing: the run's student is not trained yet.
    """
    if Path(model).suffix in RUN_FILES:
        return _of_run(Path(model), choices)
    if choices.which or choices.overrides:
        raise ConfigInvalid(f"generate: --which and --set are for a run file (RUN.yaml); {model} is none")
    folder, backend = folder_of(model), choices.backend or "auto"
    exported = is_exported(folder)
    made = partial(load_hybrid, folder, backend=backend) if exported else partial(load_model, model)
    device = _device(choices.device or "auto")
    who = "student" if exported else "teacher"
    return Speaker(f"{who} {model}", TeacherConfig(path=model), choices.template or "own", device, made)


def _of_run(path: Path, choices: Choices) -> Speaker:
    # imported here: a folder is asked without Ray's and the training's modules
    from jobs.evaluate import evaluate_job, load_student
    from jobs.stages import open_store, teacher_of
    from jobs.train import WEIGHTS

    placed = {"device": choices.device, "backend": choices.backend}
    run = load(path, [*choices.overrides, *(f"placement.{name}={value}" for name, value in placed.items() if value)])
    device, template = _device(run.placement.device), choices.template or run.prepare.template
    if choices.which == "teacher":
        made = partial(load_model, teacher_of(run))
        return Speaker(f"teacher {run.teacher.path}", run.teacher, template, device, made)
    require(open_store(run), run.ref("distill"))
    trained = partial(load_student, evaluate_job(run), WEIGHTS)
    return Speaker(f"student {run.ref('distill')}", run.teacher, template, device, trained)


def _device(name: Device) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigInvalid(
            "generate: --device cuda: torch sees no CUDA device here; leave it out, or give --device cpu"
        )
    return pick_device(name)
