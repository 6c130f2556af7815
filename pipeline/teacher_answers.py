"""The teacher's answers as a finished evaluation keeps them, for other students' evaluations to take.

Texts stand in the predictions, beside the digests of the questions; hidden states, which the KL needs, in one tensor.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from pipeline.evaluation import Answers
from pipeline.stage import require
from pipeline.store import Store
from schemas.artifacts import ArtifactRef
from schemas.canonical import differences
from schemas.errors import ArtifactDrift, ConfigInvalid
from schemas.sections import Dtype

PREDICTIONS = "predictions.jsonl"
# Its tensor `hidden` [P, D]: the states at the references' positions, question after question.
HIDDEN = "teacher.safetensors"
# Settings of an evaluation that say nothing about the teacher's answers.
FREE = ("untrained", "distribution")


def keep_hidden(store: Store, ref: ArtifactRef, hidden_PD: np.ndarray, dtype: Dtype) -> None:
    """Keeps the teacher's states in the type in which it computed them, which loses nothing."""
    # a copy: what a worker hands over cannot be written to, which torch warns of
    tensor = torch.tensor(hidden_PD, dtype=getattr(torch, dtype))
    store.write(f"{ref}/{HIDDEN}", save({"hidden": tensor}))


def take_answers(store: Store, ref: ArtifactRef, settings: Mapping[str, Any], questions: Sequence[str]) -> Answers:
    """The teacher's answers of a finished evaluation with the same ``settings``; ``questions`` are sample ids.

    Raises:
        ArtifactMissing: it is unfinished.
        ArtifactDrift: it was of other questions or another teacher, or answered otherwise; names what differs.
        ConfigInvalid: it has no answers of its own.
    """
    where = f"evaluate.teacher: {store.path(str(ref))}"
    record = require(store, ref)
    made, own = ({k: v for k, v in s.items() if k not in FREE} for s in (record.identity["settings"], settings))
    if found := differences(made, own):
        raise ArtifactDrift(
            f"{where}: was made from another teacher or other questions than this run's:\n  "
            + "\n  ".join(found)
            + "\nname an evaluation of this run's `evaluate` settings, or leave evaluate.teacher out"
        )
    if HIDDEN not in record.files:
        others = [name for name in record.identity["inputs"] if name.startswith("evaluate/")]
        taken = f"it took them from {others[0]}, which can be named here" if others else "it was made before they were"
        raise ConfigInvalid(f"{where}: keeps no answers of the teacher ({taken})")
    lines = [json.loads(line) for line in store.read(f"{ref}/{PREDICTIONS}").splitlines()]
    _refuse_others([line["sample"] for line in lines], questions, where)
    hidden = load(store.read(f"{ref}/{HIDDEN}"))["hidden"]
    return Answers([line["teacher"] for line in lines], hidden.float().numpy())


def _refuse_others(made: Sequence[str], own: Sequence[str], where: str) -> None:
    """Raises ArtifactDrift where the questions are others, as another maximum length or processor makes them."""
    if len(made) != len(own):
        raise ArtifactDrift(f"{where}: has answers to {len(made)} questions, this run asks {len(own)}")
    unlike = [i for i, (one, other) in enumerate(zip(made, own, strict=True)) if one != other]
    if unlike:
        raise ArtifactDrift(
            f"{where}: {len(unlike)} of {len(own)} questions are encoded otherwise than this run's, the first at "
            f"place {unlike[0]}; evaluate.images and prepare.max_length must be as they were there"
        )
