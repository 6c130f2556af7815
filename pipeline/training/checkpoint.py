"""Checkpoints that no engine owns: trained parameters and optimizer moments by parameter name, and the step.

One safetensors file a checkpoint, committed as a whole; its header holds the state. Any world size can go on from it.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from pipeline.headers import metadata_of
from pipeline.store import Store
from schemas.artifacts import ArtifactRef

FOLDER = "checkpoints"
KEPT = 2


@dataclass
class TrainState:
    """Where training stands: ``step`` optimizer steps of phase ``phase`` are done. ``history`` is the logged curve."""

    phase: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def save_checkpoint(
    store: Store, ref: ArtifactRef, fingerprint: str, state: TrainState, tensors: dict[str, Tensor]
) -> None:
    """Commits a checkpoint and removes all but the latest few."""
    header = {"fingerprint": fingerprint, "state": json.dumps(asdict(state))}
    name = f"phase-{state.phase:02d}-step-{state.step:08d}.safetensors"
    folder = f"{ref}/{FOLDER}"
    store.write(f"{folder}/{name}", save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, header))
    for old in store.names(folder)[:-KEPT]:
        store.remove(f"{folder}/{old}")


def latest_checkpoint(store: Store, ref: ArtifactRef, fingerprint: str) -> tuple[TrainState, dict[str, Tensor]] | None:
    """The furthest checkpoint of this very artifact, None where there is none."""
    names = store.names(f"{ref}/{FOLDER}")
    for name in reversed(names):
        data = store.read(f"{ref}/{FOLDER}/{name}")
        header = metadata_of(data)
        if header.get("fingerprint") == fingerprint:
            return TrainState(**json.loads(header["state"])), load(data)
    return None


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Tensor]:
    """The moments by ``optimizer.NAME.FIELD``; ``names`` maps a parameter's ``id`` to its name."""
    found = {}
    for parameter, moments in optimizer.state.items():
        for key, value in moments.items():
            found[f"optimizer.{names[id(parameter)]}.{key}"] = value
    return found


def restore_optimizer(optimizer: torch.optim.Optimizer, names: dict[int, str], tensors: dict[str, Tensor]) -> None:
    """Puts the moments back; parameters without any start afresh."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            prefix = f"optimizer.{names[id(parameter)]}."
            moments = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            if moments:
                # `step` is a scalar that AdamW keeps on the CPU
                optimizer.state[parameter] = {
                    k: v if k == "step" else v.to(parameter.device) for k, v in moments.items()
                }
