"""Checkpoints that no engine owns: trained parameters and optimizer moments by parameter name, and the step.

One safetensors file a checkpoint, committed as a whole; its header holds the state. Any engine and world size can go
on from it. There is no data position beyond the step, and no state of random numbers: both are functions of it.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from pipeline.headers import metadata_of
from pipeline.store import Store
from schemas.artifacts import CHECKPOINTS, ArtifactRef

BEST = "best.safetensors"


@dataclass(frozen=True)
class Saving:
    """Where checkpoints of a run go, and how many of the latest are kept."""

    store: Store
    ref: ArtifactRef
    fingerprint: str
    keep: int = 2


@dataclass
class TrainState:
    """Where training stands: ``step`` optimizer steps of phase ``phase`` are done.

    ``history`` is the logged curve, ``best`` the lowest held-out divergence so far.
    """

    phase: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: float | None = None


def save_checkpoint(saving: Saving, state: TrainState, tensors: dict[str, Tensor]) -> None:
    """Commits a checkpoint and removes all but the latest few."""
    folder = f"{saving.ref}/{CHECKPOINTS}"
    saving.store.write(
        f"{folder}/phase-{state.phase:02d}-step-{state.step:08d}.safetensors", _bytes(saving, state, tensors)
    )
    for old in saving.store.names(folder)[: -saving.keep]:
        saving.store.remove(f"{folder}/{old}")


def save_best(saving: Saving, state: TrainState, tensors: dict[str, Tensor]) -> None:
    """Commits the trained parameters of the lowest held-out divergence, over the last ones'."""
    saving.store.write(f"{saving.ref}/{BEST}", _bytes(saving, state, tensors))


def _bytes(saving: Saving, state: TrainState, tensors: dict[str, Tensor]) -> bytes:
    header = {"fingerprint": saving.fingerprint, "state": json.dumps(asdict(state))}
    return save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, header)


def latest_checkpoint(saving: Saving) -> tuple[TrainState, dict[str, Tensor]] | None:
    """The furthest checkpoint of this very artifact, None where there is none."""
    for name in reversed(saving.store.names(f"{saving.ref}/{CHECKPOINTS}")):
        found = _read(saving, f"{CHECKPOINTS}/{name}")
        if found:
            return found
    return None


def best_checkpoint(saving: Saving) -> dict[str, Tensor]:
    """The trained parameters of the lowest held-out divergence."""
    found = _read(saving, BEST)
    assert found is not None, "a run that asks for the best has held samples out"
    return found[1]


def _read(saving: Saving, name: str) -> tuple[TrainState, dict[str, Tensor]] | None:
    data = saving.store.read(f"{saving.ref}/{name}")
    header = metadata_of(data)
    if header.get("fingerprint") != saving.fingerprint:
        return None
    return TrainState(**json.loads(header["state"])), load(data)
