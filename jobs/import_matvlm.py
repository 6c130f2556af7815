"""``decant import-matvlm``: a checkpoint of MaTVLM's own code becomes an exported folder."""

from pathlib import Path

import torch
from rich.console import Console

from jobs.export import write_folder
from pipeline.folders import must_be_new, new_folder, stored_dtype
from pipeline.matvlm import load_matvlm
from pipeline.student import record_of


def import_matvlm(checkpoint: Path, teacher: Path, destination: Path, out: Console) -> None:
    """Writes the hybrid to ``destination``, which must not exist; a failure leaves nothing there.

    Raises:
        ConfigInvalid: the checkpoint is none, or not exactly the teacher's hybrid; or there is something already.
        StoreUnavailable: the destination cannot be written.
    """
    must_be_new(destination)
    student = load_matvlm(checkpoint, str(teacher), getattr(torch, stored_dtype(str(teacher))), backend="torch")
    with new_folder(destination) as folder:
        write_folder(student, str(teacher), folder)
    out.print(f"[green]{destination}[/]: layers {list(record_of(student).replaced)} are Mamba-2 mixers")
