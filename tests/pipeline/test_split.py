"""Teachers spread over several devices: ranks on the CPU and on GPUs, layers on GPUs, and the ends of ranks."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, StableLmConfig, StableLmForCausalLM

from jobs.audit import audit_cache
from jobs.demo import teacher_model
from jobs.stages import open_store, run_named, tapped_layers
from pipeline.audit import compare
from pipeline.hub import as_teacher
from pipeline.models import decoder, load_model
from pipeline.ranks import Ranks
from pipeline.shards import read_manifest, read_shard, rows_of
from pipeline.spread import layer_map, refuse_split, spread
from schemas.config import RunConfig
from schemas.errors import ConfigInvalid, TeacherLost
from schemas.placement import CachePlacement
from schemas.tables import SAMPLES, targets_table
from tests.conftest import tiny_model
from tests.decoders import COMMON, FAMILIES, WITH_IMAGES, build, image_prompt, randomise, tokens
from tests.pipeline.test_training import make_cache
from tests.ranks import failing
from tests.tolerances import FLOAT32_LOGITS

RunOf = Callable[..., RunConfig]
TENSOR = {"split": "tensor", "cpus_per_worker": 2}
EVEN = 82  # the demo's vocabulary has 81 words, which no two ranks share
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="ranks take the GPUs where there are some")


@pytest.fixture(scope="session")
def even_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny teacher, with one word more."""
    folder = tmp_path_factory.mktemp("even-llava")
    model = tiny_model()
    model.resize_token_embeddings(EVEN, mean_resizing=False)
    model.save_pretrained(folder)
    teacher_model.build_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def even_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model with grouped heads and biases."""
    folder = tmp_path_factory.mktemp("even-llama")
    model = LlamaForCausalLM(LlamaConfig(**{**COMMON, "vocab_size": EVEN}, attention_bias=True))
    randomise(model, 0)
    model.save_pretrained(folder)
    teacher_model.build_tokenizer().save_pretrained(folder)
    return folder


def without_images(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    records = json.loads(Path(settings["prepare"]["data"]).read_text())
    for record in records:
        del record["image"]
        for turn in record["conversations"]:
            turn["value"] = turn["value"].replace("<image>", "").strip()
    (folder / "text.json").write_text(json.dumps(records))
    return {**settings["prepare"], "data": str(folder / "text.json")}


def assert_alike(one: RunConfig, other: RunConfig) -> None:
    """Makes both caches: every value of one is the other's but for what rounding explains."""
    for run in (one, other):
        make_cache(run)
    table, seen = targets_table(one.cache, tapped_layers(one)), set()
    manifests = [read_manifest(open_store(run), one.ref("cache")).shards for run in (one, other)]
    samples = read_manifest(open_store(one), one.ref("prepare")).shards
    for info, *mine_theirs in zip(samples, *manifests, strict=True):
        lengths = [r["tokens"] for r in read_shard(open_store(one), one.ref("prepare"), SAMPLES, info).to_pylist()]
        mine, theirs = (
            rows_of(read_shard(open_store(run), run.ref("cache"), table, i))
            for run, i in zip((one, other), mine_theirs, strict=True)
        )
        for length, a, b in zip(lengths, mine, theirs, strict=True):
            found = compare(one.cache, length, a, b)
            assert not [d for d in found if d.beyond]
            seen |= {d.field for d in found}
    assert {"lse", "gold_logprob", "entropy", "tap_0_input", "tap_0_output"} <= seen


def check_split(run_of: RunOf, settings: dict[str, Any], folder: Path, teacher: Path, place: dict[str, Any]) -> None:
    """The cache of a teacher on one device against that of one on several."""
    text = teacher.name.startswith("even-llama0")
    vision = "none" if text else "bfloat16"
    common: dict[str, Any] = {
        "teacher": {"path": str(teacher)},
        "prepare": without_images(settings, folder) if text else settings["prepare"],
        "cache": {"positions": "all", "taps": {"layers": [0, 3], "fraction": 1.0}, "vision": vision},
    }
    runs = [
        run_of(**common, store=str(folder / name), placement={"prepare": {"workers": 0}, "cache": {"batch": 3, **how}})
        for name, how in (("one", {}), ("several", place))
    ]
    assert_alike(*runs)


@no_gpu
@pytest.mark.parametrize("teacher", ["even_llava", pytest.param("even_llama", marks=pytest.mark.slow)])
def test_two_ranks_leave_the_columns_of_one(
    run_of: RunOf, settings: dict[str, Any], tmp_path: Path, teacher: str, request: pytest.FixtureRequest
) -> None:
    check_split(run_of, settings, tmp_path, request.getfixturevalue(teacher), TENSOR)
    assert not torch.distributed.is_initialized()


@no_gpu
@pytest.mark.slow
def test_an_audit_splits_the_teacher_as_the_cache_did(
    run_of: RunOf, settings: dict[str, Any], tmp_path: Path, even_llava: Path
) -> None:
    place = {"prepare": {"workers": 0}, "cache": {"batch": 3, **TENSOR}}
    run = run_of(teacher={"path": str(even_llava)}, store=str(tmp_path / "store"), placement=place)
    make_cache(run)
    said = Console(file=io.StringIO(), width=200)
    audit_cache(run, said, 1.0, repair=False, dry_run=False)
    assert "these rows are what its teacher gives, but for rounding" in said.file.getvalue()  # type: ignore[attr-defined]
    assert not torch.distributed.is_initialized()


@no_gpu
@pytest.mark.ray
@pytest.mark.slow
# Ray's own sockets and files are closed by its processes, not by the garbage collector
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning:ray", "ignore::DeprecationWarning:ray")
def test_a_worker_of_two_ranks_on_ray_leaves_the_cache_of_one(
    run_of: RunOf, tmp_path: Path, even_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 3)  # two for the worker, and some for what decodes
    common = {"teacher": {"path": str(even_llava)}, "cache": {"positions": "all", "taps": {"layers": [0]}}}
    one, several = (
        run_of(
            **common, store=str(tmp_path / name), placement={"prepare": {"workers": 0}, "cache": {"batch": 3, **how}}
        )
        for name, how in (("one", {}), ("several", TENSOR))
    )
    for stage in ("prepare", "cache"):
        run_named(stage, several, Console(quiet=True))
    assert_alike(one, several)


@pytest.mark.gpu
@pytest.mark.multigpu
@pytest.mark.parametrize("split", ["layers", "tensor"])
@pytest.mark.parametrize("teacher", ["even_llava", "even_llama"])
def test_two_gpus_leave_the_columns_of_one(
    run_of: RunOf,
    settings: dict[str, Any],
    tmp_path: Path,
    teacher: str,
    split: str,
    request: pytest.FixtureRequest,
) -> None:
    place = {"gpus_per_worker": 2, "split": split}
    torch.zeros(1, device="cuda:1")
    torch.cuda.reset_peak_memory_stats(1)
    check_split(run_of, settings, tmp_path, request.getfixturevalue(teacher), place)
    # the second rank's memory is another process's
    assert split == "tensor" or torch.cuda.max_memory_allocated(1) > 0


DEVICES = [pytest.param("cpu", marks=no_gpu), pytest.param("cuda", marks=pytest.mark.multigpu)]
# For an end to be noticed and told on a busy machine.
SECONDS = 30.0


def started(device: str, what: str) -> tuple[subprocess.Popen[str], psutil.Process]:
    """The process of rank 0 and that of rank 1, which are both at work."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.ranks", device, what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )
    assert process.stdout is not None
    other = psutil.Process(int(process.stdout.readline()))
    time.sleep(1.0)  # into the work
    return process, other


@pytest.mark.parametrize("device", DEVICES)
def test_the_end_of_a_rank_is_a_clear_error_within_seconds(device: str) -> None:
    process, other = started(device, "work")
    os.kill(other.pid, signal.SIGKILL)
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 1, said
    assert f"process {other.pid} (rank 1) ended with exit code -9" in said.strip().splitlines()[-1]
    assert not other.is_running()


@pytest.mark.parametrize("device", DEVICES)
def test_ranks_end_with_a_killed_worker_whatever_they_wait_for(device: str) -> None:
    process, other = started(device, "wait")
    process.kill()
    process.communicate(timeout=SECONDS)
    other.wait(SECONDS)
    assert not other.is_running()


@no_gpu
def test_an_error_of_another_rank_is_told_and_ends_all() -> None:
    ranks = Ranks(2, "cpu", failing)
    with pytest.raises(TeacherLost, match="rank 1: ValueError: nothing for 1"), ranks.together():
        torch.distributed.all_reduce(torch.ones(1))
    with pytest.raises(TeacherLost, match="nothing for 1"):
        ranks.check()
    ranks.close()
    assert not ranks.processes[0].is_alive()


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_spread_evenly_and_all_else_is_on_the_first_device(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path)
    devices = [torch.device("cuda", i) for i in range(3)]
    found = layer_map(as_teacher(tmp_path), torch.float32, devices)
    names = {module: name for name, module in model.named_modules()}
    layers = [found.pop(names[layer]).index for layer in decoder(model).layers]
    assert layers == sorted(layers)
    assert set(found.values()) == {devices[0]}
    total, each = (sum(p.numel() for p in m.parameters()) for m in (model, decoder(model).layers[0]))
    held = [layers.count(i) * each for i in range(3)]
    held[0] += total - sum(held)
    assert max(held) <= max(total / 3 + each, total - sum(held[1:]))
    everywhere = dict.fromkeys([*found, *(names[layer] for layer in decoder(model).layers)], "cpu")
    again = load_model(str(tmp_path), torch.float32, torch.device("cpu"), {"device_map": everywhere})
    (text,) = tokens(11)
    inputs = image_prompt(family, text) if family in WITH_IMAGES else {"input_ids": text[None]}
    with torch.no_grad():
        torch.testing.assert_close(
            again(**inputs).logits, model(**inputs).logits, rtol=FLOAT32_LOGITS, atol=FLOAT32_LOGITS
        )


def test_what_cannot_be_split_is_refused_by_name(even_llama: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    StableLmForCausalLM(StableLmConfig(**COMMON)).save_pretrained(tmp_path)
    tensor = CachePlacement(split="tensor", gpus_per_worker=2)
    with pytest.raises(ConfigInvalid, match=r"no tensor parallel plan for stablelm; use `layers`"):
        refuse_split(as_teacher(tmp_path), tensor)
    with pytest.raises(ConfigInvalid, match=r"vocab_size \(81\) cannot be cut into 2 equal parts"):
        refuse_split(as_teacher(tiny_teacher), tensor)
    with pytest.raises(ConfigInvalid, match=r"num_key_value_heads \(2\) cannot be cut into 4 equal parts"):
        refuse_split(as_teacher(even_llama), tensor.model_copy(update={"gpus_per_worker": 4.0}))
    with pytest.raises(ConfigInvalid, match=r"4 layers cannot be split over 5 devices"):
        refuse_split(as_teacher(even_llama), CachePlacement(gpus_per_worker=5))


def test_more_gpus_than_there_are_is_an_error_before_the_model_is_read(
    even_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigInvalid, match=r"gpus_per_worker: 2 are asked for, this process sees 1"):
        spread(as_teacher(even_llama), torch.float32, torch.device("cuda"), CachePlacement(gpus_per_worker=2))


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ({"gpus_per_worker": 1.5}, "cannot be split over 1.5 devices"),
        ({"split": "tensor"}, "needs a worker with several GPUs"),
        ({"split": "tensor", "gpus_per_worker": 1, "cpus_per_worker": 4}, "needs a worker with several GPUs"),
        ({"split": "tensor", "cpus_per_worker": 2.5}, "cannot be split over 2.5 devices"),
    ],
)
def test_placements_that_split_nothing_are_refused(place: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        CachePlacement(**place)
