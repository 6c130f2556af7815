"""Recipes, phases and what a training does beside its steps, on a tiny teacher in this process."""

import json
import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from jobs import distill
from jobs.stages import open_store
from jobs.train import BACKEND, INITIAL, WEIGHTS, train_job
from pipeline.shards import read_manifest
from pipeline.stage import run_stage
from pipeline.training.checkpoint import BEST
from pipeline.training.index import is_held_out
from pipeline.training.objective import DistillObjective
from schemas.artifacts import CHECKPOINTS, LOG
from schemas.config import RunConfig
from schemas.errors import ArtifactDrift, ConfigInvalid, MemoryExhausted, ShardCorrupt, TrainingDiverged, WorkersLost
from schemas.runfile import load_run
from tests.pipeline.test_training import batches_of, make_cache, train

RunOf = Callable[..., RunConfig]
RECIPES = ["matvlm", "decant", "staged", "mambainllama", "mohawk"]


def shrunk(name: str, settings: dict[str, Any]) -> RunConfig:
    """A recipe's run file on the tiny teacher and its data, a few steps a phase."""
    run = load_run(f"jobs/configs/{name}.yaml").model_dump(mode="json")
    ours = {k: settings[k] for k in ("store", "teacher", "prepare", "evaluate")}
    taps = {**run["cache"]["taps"]} | ({"fraction": 1.0} if run["cache"]["taps"]["fraction"] else {})
    short = {"steps": 3, "epochs": None, "batch": 4, "warmup_samples": 4, "decay_samples": 4}
    phases = [{**phase, **short} for phase in run["distill"]["phases"]]
    validation = {**run["distill"]["validation"], "every": 2}
    if validation["fraction"]:
        validation["fraction"] = 0.2
    return RunConfig.model_validate(
        {
            **run,
            **ours,
            "cache": {**run["cache"], "taps": taps},
            "distill": {**run["distill"], "phases": phases, "validation": validation},
            "placement": {"prepare": {"workers": 0}},
        }
    )


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_from_its_own_cache(name: str, settings: dict[str, Any]) -> None:
    run = shrunk(name, settings)
    make_cache(run)
    distill.stage(run)
    seen: list[dict[str, Any]] = []
    trained = train(run, seen.append)
    assert {e["kind"] for e in seen} == {p.kind for p in run.distill.phases}
    initial = load(open_store(run).read(f"{run.ref('distill')}/{INITIAL}"))
    assert all(torch.isfinite(value).all() for value in trained.values())
    assert sum(not torch.equal(trained[n], initial[n]) for n in trained) > 0.9 * len(trained)


def test_matvlm_recipe_is_the_references() -> None:
    run = load_run("jobs/configs/matvlm.yaml")
    (phase,) = run.distill.phases
    assert phase.kind == "distill"
    assert (phase.weights.kl, phase.weights.layer, phase.weights.ce) == (1, 1, 0)
    assert phase.schedule(665_298).steps == 10_396
    assert (phase.lr, run.distill.betas, run.distill.weight_decay, run.distill.clip) == (2e-4, (0.9, 0.95), 0.01, 0.1)


def test_second_student_starts_from_the_first_and_replaces_more(settings: dict[str, Any]) -> None:
    first = shrunk("mambainllama", settings)
    store = make_cache(first)
    earlier = train(first)
    student = {**first.student.model_dump(), "start": "mambainllama@1", "layers": {"list": (0, 2)}}
    section = {**first.distill.model_dump(mode="json"), "artifact": "second@1"}
    plain = {**first.model_dump(mode="json"), "distill": section}
    second = RunConfig.model_validate({**plain, "student": student})
    assert str(second.earlier()) == "distill/mambainllama@1"
    train(second)
    initial = load(store.read(f"{second.ref('distill')}/{INITIAL}"))
    assert earlier.keys() < initial.keys()
    assert all(torch.equal(initial[name], value) for name, value in earlier.items())
    other = RunConfig.model_validate({**plain, "student": {**student, "layers": {"list": (1, 2)}}})
    with pytest.raises(ConfigInvalid, match=r"replaces layers \[0\], which this student keeps"):
        train(other)


VALIDATION = {"fraction": 0.3, "every": 2}
PHASES = [
    {"kind": "align", "steps": 3, "batch": 4, "lr": 1e-3},
    {"kind": "distill", "steps": 6, "batch": 4, "lr": 1e-3},
]


@pytest.mark.parametrize("kind", ["sampled", "top_k", "final_hidden"])
def test_samples_held_out_are_watched_and_never_trained_on(run_of: RunOf, kind: str) -> None:
    taps = {"fraction": 1.0}
    run = run_of(cache={"targets": {"kind": kind}, "taps": taps}, distill={"phases": PHASES, "validation": VALIDATION})
    make_cache(run)
    seen: list[dict[str, Any]] = []
    train(run, seen.append)
    watched = [e for e in seen if "held_out_kl" in e]
    assert [e["step"] for e in watched] == [2, 4, 6]
    assert all(e["kind"] == "distill" and 0 <= e["held_out_top1"] <= 1 for e in watched)
    index = batches_of(run).index
    held = {tuple(i) for i in index.first("held_out", 100)}
    assert 0 < len(held) < 40
    assert all(is_held_out(index.ids[s][r], VALIDATION["fraction"]) for s, r in held)
    trained_on = {
        tuple(i) for use in ("all", "tapped") for step in range(30) for i in index.step_items(use, 4, 0, step)
    }  # type: ignore[arg-type]
    assert trained_on | held == {(s, r) for s, rows in enumerate(index.tokens) for r in range(len(rows))}
    assert not trained_on & held


def test_best_weights_are_kept_and_left_where_asked(run_of: RunOf, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(
        DistillObjective,
        "held_out",
        lambda self, batch: {
            "kl": torch.tensor(next(found) * len(batch.positions), dtype=torch.float64),
            "top1": torch.tensor(0.0, dtype=torch.float64),
        },
    )
    phases = [{"kind": "distill", "steps": 6, "batch": 4, "lr": 1e-2}]
    section = {"phases": phases, "validation": VALIDATION, "result": "best", "checkpoint_every": 1, "keep": 3}
    place = {"prepare": {"workers": 0}, "distill": {"micro_batch": 100, "padding": 0.9}}
    run = run_of(distill=section, placement=place)
    store = make_cache(run)
    best = train(run)
    folder = f"{run.ref('distill')}/{CHECKPOINTS}"
    names = store.names(folder)
    assert len(names) == 3
    header = load(store.read(f"{run.ref('distill')}/{BEST}"))
    assert all(torch.equal(header[n], best[n]) for n in best)
    last = load(store.read(f"{folder}/{names[-1]}"))
    assert not torch.equal(
        last["model.multi_modal_projector.linear_1.weight"], best["model.multi_modal_projector.linear_1.weight"]
    )


def test_loss_that_is_no_number_names_step_and_sample_and_keeps_the_last_checkpoint(
    run_of: RunOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = [{"kind": "distill", "steps": 8, "batch": 4, "lr": 1e-3}]
    place = {"prepare": {"workers": 0}, "distill": {"micro_batch": 1}}
    run = run_of(distill={"phases": phases, "checkpoint_every": 2}, placement=place)
    store = make_cache(run)
    batches = batches_of(run)
    bad = tuple(batches.index.step_items("all", 4, 0, 5)[1])
    forward = DistillObjective.forward

    def poisoned(self: Any, batch: Any) -> Any:
        loss, metrics = forward(self, batch)
        return loss * (torch.nan if bad in {tuple(i) for i in batch.items} else 1.0), metrics

    monkeypatch.setattr(DistillObjective, "forward", poisoned)
    name = batches.index.ids[bad[0]][bad[1]]
    with pytest.raises(
        TrainingDiverged, match=rf"phase 0, step 5: the loss of a micro-batch with samples {name} is not"
    ):
        train(run)
    assert store.names(f"{run.ref('distill')}/{CHECKPOINTS}")[-1] == "phase-00-step-00000004.safetensors"
    monkeypatch.setattr(DistillObjective, "forward", forward)
    assert all(torch.isfinite(v).all() for v in train(run).values())


def test_gradient_that_is_no_number_names_the_steps_samples(run_of: RunOf) -> None:
    run = run_of(distill={"phases": [{"kind": "distill", "steps": 4, "batch": 4, "lr": 1e30}], "clip": 1e30})
    make_cache(run)
    with pytest.raises(TrainingDiverged, match=r"step [123].*is not finite.*Lower the phase's lr"):
        train(run)


def test_lack_of_memory_says_which_settings_to_lower(run_of: RunOf, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(placement={"prepare": {"workers": 0}, "distill": {"micro_batch": 16}})
    make_cache(run)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has …")

    monkeypatch.setattr(DistillObjective, "forward", full)
    with pytest.raises(
        MemoryExhausted, match=r"CUDA out of memory\. Set placement\.distill\.micro_batch \(16\) lower, or "
    ):
        train(run)


def test_damaged_shard_is_named_and_ends_the_training(run_of: RunOf) -> None:
    run = run_of(cache={"taps": {"fraction": 1.0}})
    store = make_cache(run)
    info = read_manifest(store, run.ref("cache")).shards[3]
    path = Path(store.path(f"{run.ref('cache')}/{info.name}"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # in the taps, which are most of it and not compressed
    path.write_bytes(bytes(data))
    with pytest.raises(ShardCorrupt, match=rf"{info.name}.*(checksum|CRC|cannot be read)"):
        train(run)
    assert not store.exists(f"{run.ref('distill')}/{WEIGHTS}")


def test_cache_of_another_teacher_or_other_settings_is_refused(
    run_of: RunOf, tiny_teacher: Path, tmp_path: Path
) -> None:
    run = run_of()
    store = make_cache(run)
    distill.check_cache(store, run)
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_teacher.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    template = next(f for f in other.iterdir() if "chat_template" in f.name)
    template.write_text(template.read_text().replace("ASSISTANT", "HELPER") + " ")
    with pytest.raises(ArtifactDrift, match=rf"another teacher, template or data.*\n.*{template.name}"):
        distill.check_cache(store, run_of(teacher={"path": str(other)}))
    with pytest.raises(ArtifactDrift, match=r"taps\.fraction: 0\.5 -> 0\.25"):
        distill.check_cache(store, run_of(cache={"taps": {"fraction": 0.25}}))
    with pytest.raises(ArtifactDrift, match="another teacher"):
        run_stage(store, distill.stage(run_of(cache={"targets": {"kind": "top_k"}})))


def test_targets_that_do_not_determine_the_divergence_are_refused_before_any_work(run_of: RunOf) -> None:
    section = {"phases": PHASES, "divergence": "jsd"}
    with pytest.raises(ConfigInvalid, match=r"distill\.divergence: `sampled` targets cannot give `jsd`: draws"):
        distill.stage(run_of(distill=section))
    hidden = {"targets": {"kind": "final_hidden"}, "taps": {"fraction": 0.5}}
    run = run_of(distill=section, cache=hidden)
    distill.stage(run)
    make_cache(run)
    seen: list[dict[str, Any]] = []
    train(run, seen.append)
    assert 0 < seen[-1]["kl"] < 0.7  # bounded by log 2


def test_zero_needs_steps_that_divide_over_the_workers(run_of: RunOf) -> None:
    place = {"prepare": {"workers": 0}, "distill": {"workers": 3, "strategy": "zero2"}}
    with pytest.raises(ConfigInvalid, match=r"batch: 4 does not divide evenly over 3 workers"):
        distill.stage(run_of(placement=place))
    with pytest.raises(ValueError, match="offload needs one of the strategies"):
        run_of(placement={"distill": {"offload": True}})


# torch's own, of which it hides the first by another way of showing warnings
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "options",
    [
        ("activation_checkpointing",),
        pytest.param(("compile",), marks=pytest.mark.slow),  # compiles C++
        pytest.param(("compile", "activation_checkpointing"), marks=pytest.mark.slow),  # twice
    ],
    ids="+".join,
)
def test_way_of_computing_changes_nothing_that_is_learnt(run_of: RunOf, options: tuple[str, ...]) -> None:
    phases = [{"kind": "distill", "steps": 3, "batch": 4, "lr": 1e-3}]
    curves = []
    for on in (False, True):
        place = {"prepare": {"workers": 0}, "distill": dict.fromkeys(options, on)}
        run = run_of(distill={"phases": phases, "artifact": f"way-{on}@1".lower()}, placement=place)
        if not on:
            make_cache(run)
        seen: list[dict[str, Any]] = []
        train(run, seen.append)
        curves.append([e["loss"] for e in seen])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


def test_vision_features_from_the_cache_train_as_pixels_do(run_of: RunOf) -> None:
    curves = []
    for vision in ("none", "bfloat16"):
        own = {"artifact": f"{vision}@1"}
        run = run_of(cache={"vision": vision, "taps": {"fraction": 0.5}, **own}, distill={"phases": PHASES, **own})
        make_cache(run)
        seen: list[dict[str, Any]] = []
        train(run, seen.append)
        curves.append([e["loss"] for e in seen])
    # features are rounded to eight bits, of which the losses are means
    assert curves[1] == pytest.approx(curves[0], rel=0.01)


def test_log_on_disk_is_the_reported_curve_with_speed_padding_and_memory(run_of: RunOf) -> None:
    run = run_of()
    store = make_cache(run)
    seen: list[dict[str, Any]] = []
    train(run, seen.append)
    lines = [json.loads(line) for line in store.read(f"{run.ref('distill')}/{LOG}").splitlines()]
    assert lines == seen
    entry = seen[-1]
    assert {"loss", "kl", "layer_0", "grad_norm", "lr", "tokens_per_second", "waiting_share", "memory_bytes"} <= set(
        entry
    )
    assert entry["padding_share"] <= 0.05
    assert (entry["done"], entry["total"]) == (10, 10)


def test_worker_that_is_lost_is_replaced_until_nothing_new_comes(
    run_of: RunOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `_fit` does about failures, with a stand-in for Ray's trainer."""

    class Mail(queue.Queue):  # type: ignore[type-arg]
        def __init__(self, actor_options: Any) -> None:
            super().__init__()

        def shutdown(self, force: bool) -> None: ...

    monkeypatch.setattr("ray.util.queue.Queue", Mail)
    # Ray starts a cluster of its own where one of these asks it
    monkeypatch.setattr(distill, "here", lambda: None)
    monkeypatch.setattr(distill, "check_fits", lambda *_: None)
    run = run_of(placement={"prepare": {"workers": 0}, "distill": {"retries": 2}})
    store, job, calls = make_cache(run), train_job(run, "f" * 32), []

    def trainer(ending: Callable[[int], Exception | str]) -> Any:
        """One whose nth group raises, or leaves a file."""

        class Stand:
            def fit(self) -> None:
                calls.append(1)
                end = ending(len(calls))
                if isinstance(end, Exception):
                    raise end
                store.write(f"{run.ref('distill')}/{end}", b"")

        return lambda *_: Stand()

    monkeypatch.setattr(distill, "_trainer", trainer(lambda n: RuntimeError("lost") if n < 3 else BACKEND))
    assert distill._fit(store, job) == 2
    store.remove(f"{run.ref('distill')}/{BACKEND}")
    calls.clear()
    monkeypatch.setattr(distill, "_trainer", trainer(lambda _: RuntimeError("lost")))
    with pytest.raises(RuntimeError, match="lost"):
        distill._fit(store, job)
    assert len(calls) == 3
    calls.clear()
    # five groups that leave their nodes after a checkpoint each are no failures; from then on nothing new comes
    checkpoint = f"{CHECKPOINTS}/phase-00-step-{{:08d}}.safetensors"
    monkeypatch.setattr(distill, "_trainer", trainer(lambda n: checkpoint.format(min(n, 5))))
    with pytest.raises(WorkersLost, match="before they have come to a checkpoint"):
        distill._fit(store, job)
    assert len(calls) == 5 + 3
    calls.clear()
    monkeypatch.setattr(distill, "_trainer", trainer(lambda _: TrainingDiverged("step 3")))
    with pytest.raises(TrainingDiverged):
        distill._fit(store, job)
    assert len(calls) == 1
