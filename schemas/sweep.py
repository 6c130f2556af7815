"""The sweep file of ``decant ablate``: a matrix of settings over one base run, and the trials that it stands for.

All trials train from the base run's one cache, so only ``student`` and ``distill`` tell them apart.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, field_validator, model_validator

from schemas.artifacts import ArtifactRef
from schemas.config import RunConfig, StoreConfig
from schemas.placement import Placement, WorkerPlacement
from schemas.runfile import parse_override, put, read_mapping, validated
from schemas.sections import Section

# Names of axes and their values become parts of artifacts' names, joined by hyphens: without any of their own no two
# combinations have one name.
WORD = re.compile(r"[A-Za-z0-9._]+")
Settings = dict[str, str]


class TrialPlacement(Section):
    """What one trial takes: CPUs, a GPU or a part of one, so that several trials share it, and GiB of memory."""

    cpus: float = Field(1.0, gt=0)
    # a trial trains in one process, which computes on one device
    gpus: float = Field(0.0, ge=0, le=1)
    memory: float | None = Field(None, gt=0)


class SweepConfig(Section):
    """One sweep file.

    ``run`` is the base run's file, relative to the sweep's; ``set`` overrides settings of base and trials alike.
    ``axes`` are name → value's name → overrides; trials are all combinations with all ``seeds``. ``arms``, where given,
    leaves only those that agree with one of its entries, and ``skip`` leaves out those that agree with one of its own;
    an entry names values of some axes.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    run: str
    set: dict[str, Any] = Field(default_factory=dict)
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    axes: dict[str, dict[str, dict[str, Any]]] = Field(min_length=1)
    arms: tuple[Settings, ...] = Field(({},), min_length=1)
    skip: tuple[Settings, ...] = ()
    trial: TrialPlacement = TrialPlacement()

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(dict.fromkeys(value)) != len(value) or min(value) < 0:
            raise ValueError(f"{list(value)}: seeds are distinct and not negative")
        return value

    @field_validator("axes")
    @classmethod
    def _told_apart(cls, value: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
        owners: dict[str, str] = {}
        for axis, values in value.items():
            _check_words(axis, values)
            for key in dict.fromkeys(key for overrides in values.values() for key in overrides):
                _refuse_key(key, axis)
                if key in owners:
                    raise ValueError(f"{axis} sets {key}, as axis {owners[key]} does; one of them would be lost")
                owners[key] = axis
        return value

    @model_validator(mode="after")
    def _names_what_there_is(self) -> "SweepConfig":
        for field, entries in (("arms", self.arms), ("skip", self.skip)):
            for number, entry in enumerate(entries):
                for axis, name in entry.items():
                    if name not in self.axes.get(axis, ()):
                        known = ", ".join(self.axes.get(axis, self.axes))
                        raise ValueError(f"{field}.{number}: {axis}: {name}: no such axis or value; there are {known}")
        if not self.combinations():
            raise ValueError("skip: leaves no combination of the axes")
        return self

    def combinations(self) -> tuple[Settings, ...]:
        """The arms, each the value's name by axis, in the order of the axes."""
        every = [dict(zip(self.axes, names, strict=True)) for names in itertools.product(*self.axes.values())]
        return tuple(
            one
            for one in every
            if any(entry.items() <= one.items() for entry in self.arms)
            and not any(entry.items() <= one.items() for entry in self.skip)
        )


def _check_words(axis: str, values: Mapping[str, Any]) -> None:
    if not values:
        raise ValueError(f"{axis}: has no values")
    for word in (axis, *values):
        if not WORD.fullmatch(word):
            raise ValueError(f"{axis}: {word!r} is no name here; names have letters, digits, dots and underscores")


def _refuse_key(key: str, axis: str) -> None:
    """Raises ValueError where an axis may not set the key."""
    section, _, field = key.partition(".")
    if section in ("prepare", "cache", "teacher"):
        raise ValueError(
            f"{axis}: {key}: all trials of a sweep have one cache; put it into the base run or under `set`, "
            "or make a sweep for each"
        )
    if key == "distill.seed":
        raise ValueError(f"{axis}: {key}: comes from `seeds`")
    if section not in ("student", "distill") or field in ("", "artifact"):
        raise ValueError(
            f"{axis}: {key}: trials differ in settings of `student` and `distill` alone, and have artifacts named "
            "after them; what is alike for all goes into the base run or under `set`"
        )


@dataclass(frozen=True)
class Trial:
    """One training and its evaluation: the arm's ``settings`` (value's name by axis), the seed, and the whole run."""

    settings: Settings
    seed: int
    run: RunConfig

    @property
    def name(self) -> str:
        """``sweep-arm-sSEED``, the name of its artifacts."""
        return self.run.ref("distill").name


@dataclass(frozen=True)
class Sweep:
    """A sweep file, its base run and all its trials."""

    config: SweepConfig
    base: RunConfig
    trials: tuple[Trial, ...]

    @property
    def ref(self) -> ArtifactRef:
        """Where its table goes."""
        return ArtifactRef("ablate", self.config.name, 1)

    def arms(self) -> Iterator[Trial]:
        """The first trial of each arm."""
        return (trial for trial in self.trials if trial.seed == self.config.seeds[0])

    def at(self, store: StoreConfig) -> "Sweep":
        """The same sweep with its store spelt as here."""
        base = self.base.model_copy(update={"store": store})
        trials = (replace(t, run=t.run.model_copy(update={"store": store})) for t in self.trials)
        return Sweep(self.config, base, tuple(trials))

    def as_yaml(self, run: str) -> str:
        """The sweep file for a base run file ``run`` that holds the overrides already."""
        settings = self.config.model_copy(update={"run": run, "set": {}}).model_dump(mode="json")
        return yaml.safe_dump(settings, sort_keys=False)


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """The validated sweep of a YAML file, every trial's run included.

    An override ``a.b=value`` is of a field of the sweep file (``seeds``, ``trial.gpus``), or else of its base run.

    Raises:
        ConfigInvalid: the sweep, its base run or a trial's run is missing or not valid; names the arm.
    """
    data = read_mapping(path, "sweep file")
    for override in overrides:
        key, value = parse_override(override)
        if key.partition(".")[0] in SweepConfig.model_fields:
            put(data, key, value, f"--set {override}")
        elif isinstance(given := data.setdefault("set", {}), dict):  # what else it is will be refused
            given[key] = value
    config = validated(SweepConfig, data, path)
    where = Path(path).parent / config.run
    settings = read_mapping(where, "run file")
    for key, value in config.set.items():
        put(settings, key, deepcopy(value), f"{path}: set.{key}")
    base = validated(RunConfig, settings, where)
    trials = (_trial(config, base, settings, arm, seed, path) for arm in config.combinations() for seed in config.seeds)
    return Sweep(config, base, tuple(trials))


def described(settings: Settings) -> str:
    """An arm as it stands in messages and tables."""
    return ", ".join(f"{axis} {name}" for axis, name in settings.items())


def _trial(
    config: SweepConfig, base: RunConfig, settings: dict[str, Any], arm: Settings, seed: int, path: str | Path
) -> Trial:
    data = deepcopy(settings)
    for axis, name in arm.items():
        for key, value in config.axes[axis][name].items():
            put(data, key, deepcopy(value), f"{path}: axes.{axis}.{name}.{key}")
    artifact = f"{'-'.join((config.name, *arm.values()))}-s{seed}@1"
    data["distill"] |= {"seed": seed, "artifact": artifact}
    data["evaluate"] |= {"artifact": artifact, "teacher": answers_of(base)}
    run = validated(RunConfig, data, f"{path}: {described(arm)}")
    return Trial(arm, seed, run.model_copy(update={"placement": _placed(run.placement, config.trial)}))


def answers_of(base: RunConfig) -> str:
    """The evaluation that trials take the teacher's answers from: the base run's own, unless that takes them too."""
    return base.evaluate.teacher or str(base.ref("evaluate")).partition("/")[2]


def _placed(placement: Placement, trial: TrialPlacement) -> Placement:
    """Where a trial's stages run: in the trial's own process, which has what the sweep file gives it."""
    own = {
        "workers": 0,
        "cpus_per_worker": trial.cpus,
        "gpus_per_worker": trial.gpus,
        "memory_per_worker": trial.memory,
    }
    # what is for groups of workers means nothing to one process
    alone = {**own, "min_workers": None, "strategy": "ddp", "offload": False}
    return placement.model_copy(
        update={
            "device": "cpu" if placement.device == "auto" and not trial.gpus else placement.device,
            "distill": placement.distill.model_copy(update=alone),
            "evaluate": placement.evaluate.model_copy(update=own),
        }
    )


def room_of(run: RunConfig) -> WorkerPlacement:
    """What a trial's process asks for: its amounts, on nodes that the base run's students may use."""
    given = run.placement.distill.model_dump(include=set(WorkerPlacement.model_fields))
    return WorkerPlacement(**{**given, "workers": 1})
