"""Stage ``export``: the student as one self-contained folder that a fresh process loads with ``load_hybrid``."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from jobs.stages import layer_plan, resolved, teacher_digests
from jobs.train import WEIGHTS
from pipeline.folders import processor_files, stored_dtype
from pipeline.hub import folder_of
from pipeline.ops.opset import TORCH
from pipeline.stage import Stage
from pipeline.store import Store
from pipeline.student import apply_trained, build_student, load_hybrid, save_hybrid
from pipeline.surgery import trainable_names
from schemas.config import RunConfig
from schemas.errors import ShardCorrupt

# Tokens of the check that the written folder computes what the student computes.
CHECK_TOKENS = 32


def stage(run: RunConfig) -> Stage:
    """The stage of this run. Identity: the distilled student and the teacher whose frozen weights it keeps."""
    settings = {"teacher": teacher_digests(run.teacher)}

    def work(store: Store, *_: object) -> dict[str, Any]:
        return _export(store, run)

    return Stage(run.ref("export"), (run.ref("distill"),), settings, work, resolved(run))


def _export(store: Store, run: RunConfig) -> dict[str, Any]:
    ref, teacher = run.ref("export"), folder_of(run.teacher)
    student = merged_student(store, run)
    with tempfile.TemporaryDirectory(prefix="decant-") as scratch:
        folder = Path(scratch)
        write_folder(student, teacher, folder)
        difference = _check(student, folder)
        sizes = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
        for name in sizes:
            store.write(f"{ref}/{name}", (folder / name).read_bytes())
    return {"folder": store.path(str(ref)), "files": sizes, "logit_difference": difference}


def merged_student(store: Store, run: RunConfig) -> PreTrainedModel:
    """The student on the CPU: frozen weights in the type of the teacher's files, trained ones in float32."""
    model = build_student(
        run.teacher,
        layer_plan(run),
        run.student.init,
        run.distill.seed,
        getattr(torch, stored_dtype(folder_of(run.teacher))),
        torch.device("cpu"),
        TORCH,
        teacher_digests(run.teacher),
    )
    for name in trainable_names(model, run.student.train):
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.float()
    source = f"{run.ref('distill')}/{WEIGHTS}"
    apply_trained(model, store.read(source), source)
    return model


def write_folder(student: PreTrainedModel, teacher: str, folder: Path) -> None:
    """The hybrid and the teacher's processor files."""
    save_hybrid(student, folder)
    for path in processor_files(teacher):
        shutil.copyfile(path, folder / path.name)


@torch.no_grad()
def _check(student: PreTrainedModel, folder: Path) -> float:
    """Largest logit difference, in float32, between the student and what the folder loads as; must be 0."""
    loaded = load_hybrid(folder, backend="torch")
    vocabulary = student.get_input_embeddings().num_embeddings
    ids = torch.randint(4, vocabulary, (1, CHECK_TOKENS), generator=torch.Generator().manual_seed(0))
    difference = float((student.float()(input_ids=ids).logits - loaded(input_ids=ids).logits).abs().max())
    if difference:
        raise ShardCorrupt(f"{folder}: the exported student's logits differ from the student's by {difference:g}")
    return difference
