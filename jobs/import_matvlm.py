"""``decant import-matvlm``: a checkpoint of MaTVLM's own code becomes an exported folder."""

import tempfile
from pathlib import Path

import torch
from rich.console import Console

from jobs.export import write_folder
from pipeline.folders import stored_dtype
from pipeline.matvlm import load_matvlm
from pipeline.student import record_of
from schemas.errors import ConfigInvalid, StoreUnavailable


def import_matvlm(checkpoint: Path, teacher: Path, destination: Path, out: Console) -> None:
    """Writes the hybrid to ``destination``, which must not exist; a failure leaves nothing there.

    Raises:
        ConfigInvalid: the checkpoint is none, or not exactly the teacher's hybrid; or there is something already.
        StoreUnavailable: the destination cannot be written.
    """
    if destination.exists():
        raise ConfigInvalid(f"{destination}: exists already; give another folder or remove it")
    student = load_matvlm(checkpoint, str(teacher), getattr(torch, stored_dtype(str(teacher))), backend="torch")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".import-") as scratch:
            folder = Path(scratch) / destination.name
            write_folder(student, str(teacher), folder)
            folder.rename(destination)
    except OSError as error:
        raise StoreUnavailable(f"{destination}: cannot be written: {error.strerror or error}") from None
    out.print(f"[green]{destination}[/]: layers {list(record_of(student).replaced)} are Mamba-2 mixers")
