"""Fixtures: a tiny random teacher, a few real scenes, and runs over them; the ``slow`` and ``gpu`` markers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlavaForConditionalGeneration

from cluster.session import as_host
from jobs.demo import teacher_model
from jobs.demo.data import write_split
from schemas.config import RunConfig


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run tests that take minutes")


def pytest_configure() -> None:
    """Sets Ray's switches: some tests import it without a session, and what it reads then holds for every session."""
    as_host()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpus = torch.cuda.device_count()
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--run-slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --run-slow"))
        if item.get_closest_marker("gpu") and gpus < 1:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))
        if item.get_closest_marker("multigpu") and gpus < 2:
            item.add_marker(pytest.mark.skip(reason=f"needs several CUDA devices; this machine has {gpus}"))


# Workers that a test runs in this process set their own number, on which the last bits of sums depend.
THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _threads() -> None:
    """Every test begins with the machine's number of threads, whatever ran before it."""
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Uninitialised memory reads as NaN, so that nothing passes by the luck of zeros.

    Not where CUDA kernels are compared: they have no deterministic variants to choose.
    """
    if request.node.get_closest_marker("gpu"):
        yield
        return
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def tiny_model(seed: int = 0) -> LlavaForConditionalGeneration:
    """A Llava of four Phi layers with random weights and biases large enough to matter."""
    torch.manual_seed(seed)
    vocabulary = len(teacher_model.build_tokenizer())
    config = teacher_model.build_model(vocabulary).config
    config.text_config.update(
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        }
    )
    config.vision_config.update(
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny teacher with the demo's processor."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny_model().save_pretrained(folder)
    teacher_model.build_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scenes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training and 12 test records with their images."""
    folder = tmp_path_factory.mktemp("scenes")
    write_split(folder / "train.json", "train", 40, seed=0)
    write_split(folder / "test.json", "test", 12, seed=0)
    return folder


def tiny_settings(teacher: Path, scenes: Path, store: Path) -> dict[str, Any]:
    """The settings of a run of seconds."""
    return {
        "name": "tiny",
        "store": str(store),
        "teacher": {"path": str(teacher)},
        "prepare": {"data": str(scenes / "train.json"), "images": str(scenes), "shard_rows": 4, "max_length": 128},
        "cache": {"taps": {"fraction": 0.5}},
        "student": {"layers": {"ratio": 0.25}},
        "distill": {
            "phases": [
                {"kind": "align", "steps": 4, "batch": 4, "lr": 1e-3},
                {"kind": "distill", "steps": 6, "batch": 4, "lr": 1e-3},
            ],
            "checkpoint_every": 2,
        },
        "evaluate": {"data": str(scenes / "test.json"), "images": str(scenes), "group_by": "family"},
        "placement": {"prepare": {"workers": 0}},
    }


@pytest.fixture
def settings(tiny_teacher: Path, scenes_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """A small run's settings, to be changed by a test before it makes a run of them."""
    return tiny_settings(tiny_teacher, scenes_folder, tmp_path / "store")


@pytest.fixture
def run_of(settings: dict[str, Any]) -> Callable[..., RunConfig]:
    """Makes a run of the settings, with sections replaced by keyword."""

    def make(**sections: Any) -> RunConfig:
        return RunConfig.model_validate({**settings, **sections})

    return make


@pytest.fixture
def run_file(settings: dict[str, Any], tmp_path: Path) -> Path:
    """The settings as a run file."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path
