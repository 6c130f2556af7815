"""Experiment trackers that ``distill`` reports to when asked: TensorBoard, Weights & Biases, MLflow.

A tracker is told what the terminal shows and decides nothing: one that fails is dropped with a line, and the training
goes on. Where a tracker's server is, who logs in and whether it stays offline is for its own environment variables
(``WANDB_MODE``, ``WANDB_PROJECT``, ``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``, …). A resumed stage is another
run of the same name, which begins at the step where the training goes on.
"""

import importlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jobs.stages import resolved
from schemas.config import RunConfig
from schemas.errors import ConfigInvalid
from schemas.sections import Tracker

PACKAGES: dict[Tracker, str] = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
# Where an entry belongs, not what was measured there.
PLACE = ("phase", "step", "steps", "done", "total")
# The W&B project where the environment names none.
PROJECT = "decant"


@dataclass(frozen=True)
class Sink:
    """An open tracker: ``send`` takes numbers by name and their step, ``close`` whether the training failed."""

    send: Callable[[dict[str, float], int], None]
    close: Callable[[bool], None]


def check_trackers(names: Sequence[Tracker]) -> None:
    """Checks that every tracker's package is installed; imports none of them.

    Raises:
        ConfigInvalid: one is not; names the command that installs it.
    """
    for name in names:
        if find_spec(PACKAGES[name]) is None:
            raise ConfigInvalid(
                f"placement.distill.trackers: {name} needs the package {PACKAGES[name]}, which is not installed; "
                f"install it with: pip install {PACKAGES[name]}; or take {name} off the list"
            )


@contextmanager
def open_trackers(
    names: Sequence[Tracker], run: RunConfig, folder: Path, say: Callable[[str], None]
) -> Iterator["Trackers"]:
    """The trackers, named after the run's artifact, until the training ends or fails.

    ``folder`` is local, for TensorBoard's files and what W&B keeps; ``say`` shows a line to the user.
    """
    trackers = Trackers(say)
    for name in names:
        trackers.open(name, run, folder)
    try:
        yield trackers
    except BaseException:
        trackers.close(failed=True)
        raise
    trackers.close(failed=False)


class Trackers:
    """All trackers of one training that still work."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.sinks: dict[Tracker, Sink] = {}

    def open(self, name: Tracker, run: RunConfig, folder: Path) -> None:
        """Begins the tracker's run."""
        with self._dropped_on_failure(name):
            folder.mkdir(parents=True, exist_ok=True)
            self.sinks[name] = OPENERS[name](str(run.ref("distill")), resolved(run), folder)

    def log(self, entry: Mapping[str, Any], step: int) -> None:
        """Sends an entry's numbers as ``KIND/NAME``; ``step`` counts over all phases."""
        numbers = {
            f"{entry['kind']}/{name}": float(value)
            for name, value in entry.items()
            if isinstance(value, int | float) and name not in PLACE
        }
        for name, sink in tuple(self.sinks.items()):
            with self._dropped_on_failure(name):
                sink.send(numbers, step)

    def close(self, *, failed: bool) -> None:
        """Ends all runs, as failed ones if the training did."""
        for name, sink in tuple(self.sinks.items()):
            with self._dropped_on_failure(name):
                sink.close(failed)
        self.sinks.clear()

    @contextmanager
    def _dropped_on_failure(self, name: Tracker) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a client or its server raises is worth less than the training
            self.sinks.pop(name, None)
            self.say(f"{name} is told nothing more: {type(error).__name__}: {error}")


def _tensorboard(ref: str, config: dict[str, Any], folder: Path) -> Sink:
    # not its `SummaryWriter`, whose thread dies of a full disk in silence and then holds up who reports
    event_type = importlib.import_module("tensorboardX.proto.event_pb2").Event
    text = importlib.import_module("tensorboardX.summary").text
    writer = importlib.import_module("tensorboardX.event_file_writer").EventsWriter(str(folder / "events"))

    def send(numbers: dict[str, float], step: int) -> None:
        event = event_type(wall_time=time.time(), step=step)
        for name, value in numbers.items():
            event.summary.value.add(tag=name, simple_value=value)
        writer.write_event(event)
        writer.flush()

    settings = text(ref, f"```\n{json.dumps(config, indent=2)}\n```")
    writer.write_event(event_type(wall_time=time.time(), summary=settings))
    return Sink(send, lambda _: writer.close())


def _wandb(ref: str, config: dict[str, Any], folder: Path) -> Sink:
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    run = importlib.import_module("wandb").init(project=project, name=ref, config=config, dir=str(folder))
    return Sink(lambda numbers, step: run.log(numbers, step=step), lambda failed: run.finish(exit_code=int(failed)))


def _mlflow(ref: str, config: dict[str, Any], _: Path) -> Sink:
    mlflow = importlib.import_module("mlflow")
    run_id = mlflow.start_run(run_name=ref).info.run_id
    mlflow.log_params(_flat(config))

    def send(numbers: dict[str, float], step: int) -> None:
        # by id: the run is another thread's
        mlflow.log_metrics(numbers, step=step, run_id=run_id)

    return Sink(send, lambda failed: mlflow.end_run("FAILED" if failed else "FINISHED"))


def _flat(config: Any, name: str = "") -> dict[str, Any]:
    """Values by their dotted names, as MLflow wants its parameters."""
    if not isinstance(config, dict | list):
        return {name: config}
    items = config.items() if isinstance(config, dict) else enumerate(config)
    return {k: v for key, value in items for k, v in _flat(value, f"{name}.{key}".lstrip(".")).items()}


OPENERS: dict[Tracker, Callable[[str, dict[str, Any], Path], Sink]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
