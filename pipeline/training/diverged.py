"""Finds the samples of a step whose loss is not a number any more."""

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.training.batch import Batch
from pipeline.training.batches import CachedBatches
from pipeline.training.engine import Worker
from schemas.errors import TrainingDiverged

# Samples named in a message; with more the setting is to blame, not the samples.
NAMED = 8


def diverged(
    batches: CachedBatches, losses: list[tuple[Batch, Tensor]], worker: Worker, phase: int, step: int, norm: float
) -> TrainingDiverged:
    """The error of a step whose gradient norm is not finite, equal on every worker; a collective call."""
    own: dict[bool, list[str]] = {True: [], False: []}
    for batch, loss in losses:
        own[bool(torch.isfinite(loss))] += batches.sample_ids(batch.items)
    found: list[dict[bool, list[str]] | None] = [own]
    if worker.world > 1:
        found = [None] * worker.world
        dist.all_gather_object(found, own)
    good, bad = (sorted(i for part in found if part for i in part[finite]) for finite in (True, False))
    names = bad or good
    where = "the loss of a micro-batch with samples" if bad else "the gradient, but no loss, of the samples"
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return TrainingDiverged(
        f"distill: phase {phase}, step {step}: {where} {', '.join(names[:NAMED])}{more} is not finite (norm {norm}). "
        "The last checkpoint is kept, and the same command goes on from it. Lower the phase's lr, or look at these "
        "samples (sample_id in prepare and cache); `decant inspect RUN.yaml --verify` finds damaged ones"
    )
