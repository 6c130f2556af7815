"""Tiny students as commands leave them: exported folders, and runs whose training is finished."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from jobs.export import write_folder
from jobs.stages import layer_plan, open_store
from jobs.train import WEIGHTS
from pipeline.ops.opset import TORCH
from pipeline.stage import record_bytes
from pipeline.student import build_student, record_of, trained_bytes
from pipeline.surgery import trainable_names
from schemas.artifacts import ArtifactRecord
from schemas.config import RunConfig
from schemas.layers import LayerPlan

CPU = torch.device("cpu")


def export_student(teacher: Path, folder: Path) -> Path:
    """An exported student with mixers in two of four layers."""
    model = build_student(str(teacher), LayerPlan(4, (1, 2)), "mimic", 0, torch.float32, CPU, TORCH)
    write_folder(model, str(teacher), folder)
    return folder


def start_student(run: RunConfig) -> PreTrainedModel:
    """The run's student before any training."""
    how = (layer_plan(run), run.student.init, run.distill.seed)
    return build_student(run.teacher.path, *how, torch.float32, CPU, TORCH)


def finish_training(run: RunConfig, student: PreTrainedModel) -> None:
    """Commits the student's weights as what the run's training came to."""
    names = trainable_names(student, run.student.train)
    data = trained_bytes({n: student.get_parameter(n) for n in names}, record_of(student), run.student.train)
    store, ref = open_store(run), run.ref("distill")
    store.write(f"{ref}/{WEIGHTS}", data)
    record = ArtifactRecord(
        ref=str(ref), fingerprint="0", identity={}, result={}, provenance={}, config={}, files={}
    ).sealed()
    store.write(ref.record_path, record_bytes(record))
