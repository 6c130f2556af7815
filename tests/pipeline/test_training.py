"""Training from a real cache in this process, without Ray."""

import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load
from transformers.models.llava.modeling_llava import LlavaModel

import pipeline.capture
import pipeline.store
from jobs import cache, distill, prepare
from jobs.sources import sources_of
from jobs.stages import layer_plan, open_store, tapped_layers
from jobs.train import INITIAL, WEIGHTS, train_job, train_student
from pipeline.activations import decode_activation
from pipeline.data.collate import pad_tokens
from pipeline.data.processors import load_processor
from pipeline.journal import Journal
from pipeline.losses import full_kl, target_kl
from pipeline.mixer import Mamba2Mixer
from pipeline.models import body, decoder, head, load_config, load_model
from pipeline.ops.opset import TORCH
from pipeline.shards import column_bytes, fold_manifest, read_manifest, read_shard, uncommitted
from pipeline.stage import Stage, require, run_stage
from pipeline.store import Store
from pipeline.student import build_student
from pipeline.taps import recorded
from pipeline.training.batch import Batch
from pipeline.training.batches import CachedBatches, use_of
from pipeline.training.engine import Worker
from pipeline.training.recompute import TeacherLayers
from pipeline.training.watch import SPEED
from schemas.artifacts import LOG
from schemas.config import RunConfig
from schemas.errors import ConfigInvalid
from schemas.manifest import MANIFEST
from schemas.recipe import AlignPhase, AnyPhase, DistillPhase
from schemas.tables import STATISTICS, targets_table
from tests.decoders import FAMILIES, THREE_D, build, tokens
from tests.flaky import FlakyFileSystem
from tests.tolerances import BFLOAT16_RELATIVE, FLOAT16_LOGPROB, FLOAT32_LOGITS

WORKER = Worker(0, 1, torch.device("cpu"))
RunOf = Callable[..., RunConfig]


def make_cache(run: RunConfig) -> Store:
    """Runs `prepare` and, in this process, what the Ray actors of `cache` run."""
    run_stage(open_store(run), prepare.stage(run))
    return make_targets(run)


def make_targets(run: RunConfig) -> Store:
    """Runs, in this process, what the Ray actors of `cache` run, over samples that there are."""
    store, planned = open_store(run), cache.stage(run)

    def work(store: Store, fingerprint: str, journal: Journal) -> dict[str, Any]:
        job = cache.cache_job(run, fingerprint, journal.command)
        count = len(read_manifest(store, job.samples).shards)
        actor = cache.TeacherActor(job)
        for index in uncommitted(store, job.targets, count):
            actor(cache.decode_shard(pa.table({"shard": [index]}), job))
        actor.teacher.close()
        fold_manifest(store, job.targets, targets_table(job.config, job.tapped), count, fingerprint)
        return {}

    run_stage(store, Stage(planned.ref, planned.inputs, planned.settings, work, planned.config))
    return store


def train(run: RunConfig, report: Callable[[dict[str, Any]], None] = lambda _: None) -> dict[str, torch.Tensor]:
    """Trains in this process; returns the trained parameters."""
    train_student(train_job(run, "f" * 32), WORKER, report)
    return load(open_store(run).read(f"{run.ref('distill')}/{WEIGHTS}"))


def curve_of(run: RunConfig) -> list[dict[str, Any]]:
    """The log of a training, but for how fast it went."""
    lines = open_store(run).read(f"{run.ref('distill')}/{LOG}").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in SPEED} for line in lines]


def assert_same_shards(here: RunConfig, there: RunConfig) -> Store:
    """Makes both runs' caches: the same shards of the same bytes. Returns the second's store."""
    local, remote = make_cache(here), make_cache(there)
    for ref in (here.ref("prepare"), here.ref("cache")):
        names = [n for n in local.names(str(ref)) if n.endswith((".parquet", MANIFEST))]
        assert names == [n for n in remote.names(str(ref)) if n.endswith((".parquet", MANIFEST))]
        assert all(local.read(f"{ref}/{n}") == remote.read(f"{ref}/{n}") for n in names)
    return remote


def assert_alike(here: RunConfig, there: RunConfig) -> Store:
    """Makes both runs' caches and trains from them: the same bytes, the same weights. Returns the second's store."""
    remote = assert_same_shards(here, there)
    mine, theirs = train(here), train(there)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    return remote


def whole_step(batches: CachedBatches, phase: AnyPhase, step: int = 0) -> Batch:
    """All samples of a step as one micro-batch."""
    items = batches.index.step_items(use_of(phase), phase.batch, 0, step)
    totals = batches.plan(phase, 0, step, 0, 1)[0][2]
    return batches.batch(phase, items, True, totals)


def batches_of(run: RunConfig, layers: tuple[int, ...] | None = None) -> CachedBatches:
    store = open_store(run)
    processor = load_processor(run.teacher)
    layers = layer_plan(run).replaced if layers is None else layers
    vocabulary = load_config(run.teacher).get_text_config().vocab_size
    return CachedBatches(
        store,
        run.ref("prepare"),
        sources_of(run),
        layers,
        processor,
        vocabulary,
        micro_batch=4,
        held_out=run.distill.validation.fraction,
    )


class Killed(BaseException):
    pass


@pytest.mark.parametrize("dies_at", [(0, 1), (0, 4), (1, 1), (1, 6)])
def test_training_that_dies_at_any_step_resumes_to_identical_weights(
    run_of: RunOf, dies_at: tuple[int, int], tmp_path: Any
) -> None:
    run = run_of()
    make_cache(run)
    twice = run_of(distill={**run.distill.model_dump(), "artifact": "twice@1"})
    seen: list[tuple[int, int]] = []

    def die(entry: dict[str, Any]) -> None:
        seen.append((entry["phase"], entry["step"]))
        if seen[-1] == dies_at:
            raise Killed

    with pytest.raises(Killed):
        train(twice, die)
    resumed, whole = train(twice), train(run)
    assert set(resumed) == set(whole)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_training_never_calls_the_teacher(run_of: RunOf, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of()
    make_cache(run)
    forward = LlavaModel.forward

    def students_only(self: LlavaModel, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(m, Mamba2Mixer) for m in self.modules()):
            raise AssertionError("the teacher was called")
        return forward(self, *args, **kwargs)

    def no_teacher(*_: Any) -> None:
        raise AssertionError("a teacher was made")

    monkeypatch.setattr(LlavaModel, "forward", students_only)
    monkeypatch.setattr(pipeline.capture.Teacher, "__init__", no_teacher)
    with pytest.raises(AssertionError, match="the teacher was called"):
        body(load_model(run.teacher, torch.float32, WORKER.device))(input_ids=torch.tensor([[5]]))
    assert train(run)


def test_only_mixers_and_connector_change_and_align_leaves_the_connector(run_of: RunOf) -> None:
    run = run_of()
    store = make_cache(run)
    trained = train(run)
    initial = load(store.read(f"{run.ref('distill')}/{INITIAL}"))
    assert set(trained) == set(initial)
    assert all(not torch.equal(trained[n], initial[n]) for n in trained)
    align = run_of(distill={"phases": [{"kind": "align", "steps": 3, "batch": 4, "lr": 1e-3}], "artifact": "align@1"})
    aligned = train(align)
    moved = {n for n in aligned if not torch.equal(aligned[n], initial[n])}
    assert moved == {n for n in aligned if ".self_attn." in n}


def test_training_lowers_both_losses(run_of: RunOf) -> None:
    phases = [
        {"kind": "align", "steps": 40, "batch": 8, "lr": 1e-2},
        {"kind": "distill", "steps": 40, "batch": 8, "lr": 3e-3},
    ]
    run = run_of(distill={"phases": phases, "clip": 1.0})
    make_cache(run)
    curve: list[dict[str, Any]] = []
    train(run, curve.append)
    align, joint = ([e for e in curve if e["phase"] == p] for p in (0, 1))
    assert align[-1]["loss"] < 0.7 * align[0]["loss"]
    assert joint[-1]["kl"] < 0.7 * joint[0]["kl"]


def test_batch_holds_what_the_teacher_said(run_of: RunOf) -> None:
    """Against a teacher run here: predicted positions, taps and entropies of a batch are the teacher's own."""
    run = run_of()
    make_cache(run)
    phase = DistillPhase(kind="distill", steps=1, batch=6)
    batch = whole_step(batches_of(run), phase)
    teacher = load_model(run.teacher, torch.float32, WORKER.device)
    assert batch.positions is not None
    assert batch.targets is not None
    assert batch.taps is not None
    hidden = body(teacher)(**batch.inputs, use_cache=False).last_hidden_state
    logits = head(teacher)(hidden[batch.positions[:, 0], batch.positions[:, 1]])
    p = logits.softmax(-1)
    # float16 keeps eleven bits of an entropy below 5 nats
    torch.testing.assert_close(batch.targets.entropy, -(p * p.log()).sum(-1), rtol=2**-10, atol=1e-4)
    assert torch.bincount(batch.targets.row, batch.targets.share).tolist() == pytest.approx([1.0] * len(p))
    following = batch.inputs["input_ids"][batch.positions[:, 0], batch.positions[:, 1] + 1]
    assert torch.equal(batch.gold, following)
    assert batch.totals.positions == len(p)
    (layer,) = batch.taps.layers
    value_in, value_out = (value.wide() for value in batch.taps.layers[layer])
    attention = body(teacher).language_model.layers[layer].self_attn
    lengths = batch.taps.mask.sum(1)
    assert int(lengths.sum()) == batch.totals.tap_tokens
    positions = torch.arange(value_in.shape[1])[None]
    rotary = body(teacher).language_model.rotary_emb(value_in.float(), positions)
    again, _ = attention(hidden_states=value_in.float(), position_embeddings=rotary, attention_mask=None)
    scale = float(value_out.float().abs().max())
    real = batch.taps.mask
    torch.testing.assert_close(
        again[real], value_out.float()[real], rtol=4 * BFLOAT16_RELATIVE, atol=4 * BFLOAT16_RELATIVE * scale
    )


def test_another_batch_size_draws_the_same_ids(run_of: RunOf, tmp_path: Path) -> None:
    run = run_of()
    store = make_cache(run)
    again = run_of(store=str(tmp_path / "again"), placement={"prepare": {"workers": 0}, "cache": {"batch": 1}})
    other = make_cache(again)
    for shard in read_manifest(store, run.ref("cache")).shards:
        one, two = (pq.read_table(s.path(f"{run.ref('cache')}/{shard.name}")) for s in (store, other))
        for column in ("sample_id", "ids", "counts", "n_unique"):
            assert one[column].equals(two[column]), (shard.name, column)


CODE = """
import sys, time, torch
from jobs.train import train_job, train_student
from pipeline.training.engine import Worker
from schemas.config import RunConfig
run = RunConfig.model_validate_json(open(sys.argv[1]).read())
train_student(train_job(run, "f" * 32), Worker(0, 1, torch.device("cpu")), lambda entry: time.sleep(0.2))
"""


# More checkpoints than any run has.
NEVER = 10**6


def begin_and_kill(run: RunConfig, file: Path, after: int, seconds: float) -> bool:
    """Trains in another process, killed some time after its ``after``-th new checkpoint; whether it was in time."""
    file.write_text(run.model_dump_json())
    process = subprocess.Popen([sys.executable, "-c", CODE, str(file)], stderr=subprocess.DEVNULL)
    folder = Path(open_store(run).path(str(run.ref("distill"))))
    before = set(folder.glob("checkpoints/phase-*"))
    seen: set[Path] = set()
    while len(seen) < after and process.poll() is None:
        seen |= set(folder.glob("checkpoints/phase-*")) - before
        time.sleep(0.002)
    time.sleep(seconds)
    landed = process.poll() is None
    process.kill()
    process.wait()
    return landed


def test_sigkilled_training_process_resumes_to_identical_weights_and_curve(run_of: RunOf, tmp_path: Path) -> None:
    run = run_of()
    make_cache(run)
    twice = run_of(distill={**run.distill.model_dump(), "artifact": "twice@1"})
    assert begin_and_kill(twice, tmp_path / "run.json", 1, 0.0)
    assert not Path(open_store(twice).path(f"{twice.ref('distill')}/{WEIGHTS}")).exists()
    resumed, whole = train(twice), train(run)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert curve_of(twice) == curve_of(run)


@pytest.mark.slow
def test_twenty_kills_at_random_steps_leave_weights_and_curve_as_they_would_be(run_of: RunOf, tmp_path: Path) -> None:
    phases = [{**p.model_dump(), "steps": 5 * (p.steps or 0)} for p in run_of().distill.phases]
    chance = random.Random(0)

    def named(name: str) -> RunConfig:
        return run_of(distill={"phases": phases, "artifact": f"{name}@1", "checkpoint_every": 3})

    def finished(run: RunConfig) -> dict[str, torch.Tensor]:
        """In such a process as well: other algorithms, and bits, are chosen where uninitialised memory is poisoned."""
        begin_and_kill(run, tmp_path / "run.json", NEVER, 0.0)
        return load(open_store(run).read(f"{run.ref('distill')}/{WEIGHTS}"))

    make_cache(named("whole"))
    whole, landed, artifacts = finished(named("whole")), 0, 0
    while landed < 20:
        run = named(f"round-{artifacts}")
        kills = [(chance.randrange(4), chance.uniform(0, 0.6)) for _ in range(chance.randrange(2, 5))]
        landed += sum(begin_and_kill(run, tmp_path / "run.json", *kill) for kill in kills)
        resumed, artifacts = finished(run), artifacts + 1
        assert all(torch.equal(resumed[name], value) for name, value in whole.items())
        assert curve_of(run) == curve_of(named("whole"))
    print(f"{landed} kills landed, over {artifacts} artifacts")


@pytest.mark.parametrize("kind", ["align", "distill"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_workers_share_one_steps_samples_in_micro_batches_with_little_padding(
    run_of: RunOf, kind: str, world: int
) -> None:
    run = run_of()
    make_cache(run)
    batches = batches_of(run)
    phase = (AlignPhase if kind == "align" else DistillPhase)(kind=kind, steps=1, batch=10)  # type: ignore[arg-type]
    plans = [batches.plan(phase, 0, 3, rank, world) for rank in range(world)]
    assert len({totals for plan in plans for _, _, totals in plan}) == 1
    items = [tuple(i) for plan in plans for group, _, _ in plan for i in group]
    assert sorted(items) == sorted(map(tuple, batches.index.step_items(use_of(phase), 10, 0, 3)))
    assert all([last for _, last, _ in plan] == [False] * (len(plan) - 1) + [True] for plan in plans)
    made = [batches.batch(phase, *part) for plan in plans for part in plan]
    assert all(b.padding <= 0.05 * (b.tokens + b.padding) for b in made)
    assert all(len(b.items) <= 4 for b in made)
    totals = made[0].totals
    if kind == "distill":
        assert sum(b.tokens for b in made) == totals.tokens
        assert sum(len(b.gold) for b in made) == totals.positions  # type: ignore[arg-type]
        assert sum(int(b.supervised.sum()) for b in made) == totals.supervised  # type: ignore[union-attr]
    assert sum(0 if b.taps is None else int(b.taps.mask.sum()) for b in made) == totals.tap_tokens > 0


def test_recipe_with_a_layer_loss_and_no_taps_is_refused(run_of: RunOf) -> None:
    with pytest.raises(ConfigInvalid, match=r"cache\.taps: the recipe has a layer loss.*layers \[0\]"):
        distill.stage(run_of(cache={"taps": {"fraction": 0}}))
    phases = [{"kind": "distill", "steps": 1, "batch": 4, "weights": {"layer": 0}}]
    distill.stage(run_of(cache={"taps": {"fraction": 0}}, distill={"phases": phases}))


def test_bfloat16_training_keeps_the_trained_parameters_in_float32(run_of: RunOf) -> None:
    run = run_of(distill={"phases": [{"kind": "distill", "steps": 2, "batch": 4}], "dtype": "bfloat16"})
    make_cache(run)
    trained = train(run)
    assert {v.dtype for v in trained.values()} == {torch.float32}
    assert all(torch.isfinite(v).all() for v in trained.values())


def test_matvlm_initialisation_trains_as_well(run_of: RunOf) -> None:
    run = run_of(student={"layers": {"list": [1, 3]}, "init": "matvlm"})
    make_cache(run)
    trained = train(run)
    model = build_student(run.teacher, layer_plan(run), "matvlm", 0, torch.float32, WORKER.device, TORCH)
    assert set(trained) <= {n for n, _ in model.named_parameters()}
    assert not any(n.endswith("in_proj.bias") for n in trained)


def test_norms_and_feed_forward_of_the_replaced_layer_train_where_asked(run_of: RunOf) -> None:
    run = run_of(student={"layers": {"list": [1]}, "train": ["mixers", "norms", "mlp"]})
    make_cache(run)
    trained = train(run)
    teacher = load_model(run.teacher, torch.float32, WORKER.device)
    frozen_before = {n: p for n, p in teacher.named_parameters() if n in trained}
    layer = "model.language_model.layers.1."
    assert {n.removeprefix(layer).split(".")[0] for n in trained} == {"self_attn", "mlp", "input_layernorm"}
    assert frozen_before.keys() == {n for n in trained if "self_attn" not in n}
    assert all(not torch.equal(trained[n], p) for n, p in frozen_before.items())


KINDS: dict[str, dict[str, Any]] = {
    "top_k": {"kind": "top_k", "k": 8},
    "bfloat16": {"kind": "final_hidden"},
    "fp8": {"kind": "final_hidden", "dtype": "fp8_e4m3"},
}


@pytest.mark.parametrize(
    ("kind", "positions"),
    [("top_k", "response"), ("bfloat16", "response"), ("fp8", "text"), ("bfloat16", "text"), ("top_k", "all")],
)
def test_cached_loss_is_the_live_teachers(run_of: RunOf, kind: str, positions: str) -> None:
    """The KL from the cache against the KL to a teacher run here, for every kind of target and choice of positions."""
    run = run_of(cache={"targets": KINDS[kind], "positions": positions, "taps": {"fraction": 0}})
    make_cache(run)
    batch = whole_step(batches_of(run, layers=()), DistillPhase(kind="distill", steps=1, batch=6))
    assert batch.positions is not None
    assert batch.targets is not None
    teacher = load_model(run.teacher, torch.float32, WORKER.device)
    student = build_student(run.teacher, layer_plan(run), "mimic", 0, torch.float32, WORKER.device, TORCH)
    with torch.no_grad():
        states = [body(m)(**batch.inputs, use_cache=False).last_hidden_state for m in (teacher, student)]
        theirs, ours = (s[batch.positions[:, 0], batch.positions[:, 1]] for s in states)
        live = full_kl(head(teacher)(theirs), head(student)(ours))
        cached = target_kl(ours, head(student), batch.targets, 1.0)
    assert live.numel() == batch.totals.positions
    assert positions != "all" or live.numel() == batch.totals.tokens
    assert batch.gold is not None
    gold = batch.gold
    image = load_processor(run.teacher).image_token_id
    assert bool((gold == image).any()) == (positions == "all")
    if kind == "top_k":  # lumping outcomes together can only lose divergence
        assert 0 < float(cached) <= float(live.sum())
    else:
        recovered = full_kl(head(teacher)(theirs), head(teacher)(batch.targets.hidden.wide()))  # type: ignore[union-attr]
        assert float(recovered.mean()) <= (1e-3 if kind == "bfloat16" else 2e-2)
        assert float(cached) == pytest.approx(float(live.sum()), rel=0.01 if kind == "bfloat16" else 0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_target_trains_with_float8_taps(run_of: RunOf, kind: str) -> None:
    phases = [{"kind": "align", "steps": 2, "batch": 4}, {"kind": "distill", "steps": 20, "batch": 8, "lr": 2e-3}]
    run = run_of(
        cache={"targets": KINDS[kind], "taps": {"fraction": 1, "dtype": "fp8_e4m3"}},
        distill={"phases": phases, "clip": 10.0},
    )
    make_cache(run)
    curve: list[dict[str, Any]] = []
    trained = train(run, curve.append)
    losses = [e["kl"] for e in curve if e["kind"] == "distill"]
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.isfinite(v).all() for v in trained.values())


def test_cache_on_a_store_that_fails_now_and_then_has_the_same_bytes_and_trains(
    run_of: RunOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.store.time, "sleep", lambda _: None)
    FlakyFileSystem.start(rate=0.1)
    here, there = run_of(), run_of(store="flaky:///runs")
    assert_alike(here, there)
    assert len(FlakyFileSystem.failures) >= 5


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in THREE_D])
@torch.no_grad()
def test_recomputed_outputs_are_the_teachers(family: str) -> None:
    """A right-padded batch through the whole teacher, and each layer's attention alone on its input."""
    model, rows = build(family), tokens(5, 11, 2)
    ids, mask = pad_tokens([r.numpy() for r in rows], 0)
    layers: Any = decoder(model).layers
    with recorded(layers, (0, 3)) as taps:
        body(model)(input_ids=ids, attention_mask=mask, use_cache=False)
    again = TeacherLayers({i: layers[i].self_attn for i in (0, 3)}, decoder(model))
    for layer, (value_in, value_out) in taps.items():
        found = again.output(layer, value_in, mask)
        torch.testing.assert_close(found[mask == 1], value_out[mask == 1], rtol=FLOAT32_LOGITS, atol=FLOAT32_LOGITS)
        alone = again.output(layer, value_in[1:2])
        torch.testing.assert_close(alone, value_out[1:2], rtol=FLOAT32_LOGITS, atol=FLOAT32_LOGITS)


def test_recomputed_targets_halve_the_taps_and_train_as_stored_ones(run_of: RunOf) -> None:
    phases = [{"kind": "align", "steps": 10, "batch": 8, "lr": 2e-3}]
    losses, sizes = [], []
    for kind in ("stored", "recompute"):
        taps = {"fraction": 1.0, "targets": kind}
        own = {"artifact": f"{kind}@1"}
        run = run_of(cache={"taps": taps, **own}, distill={"phases": phases, "clip": 10.0, **own})
        store = make_cache(run)
        columns = column_bytes(store, run.ref("cache"), read_manifest(store, run.ref("cache")))
        sizes.append({name: size for name, size in columns.items() if name.startswith("tap_")})
        curve: list[dict[str, Any]] = []
        train(run, curve.append)
        losses.append([entry["loss"] for entry in curve])
    # but for the pages' checksums, numbers that take four or five bytes
    assert sizes[1] == {"tap_0_input": pytest.approx(sizes[0]["tap_0_output"], rel=1e-4)}
    # the stored output is the attention's on the exact input, rounded to bfloat16; the other on the rounded input
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_recomputing_is_refused_where_positions_come_from_images(run_of: RunOf, tmp_path: Path) -> None:
    build("qwen2.5-vl").save_pretrained(tmp_path / "qwen")
    with pytest.raises(ConfigInvalid, match=r"cache\.taps\.targets: `recompute`.*use `stored`"):
        cache.stage(run_of(teacher={"path": str(tmp_path / "qwen")}, cache={"taps": {"targets": "recompute"}}))


def test_two_writers_of_one_cache_at_the_same_time_do_no_harm(run_of: RunOf, tmp_path: Path) -> None:
    alone, shared = run_of(), run_of(store=str(tmp_path / "shared"))
    store, expected = open_store(shared), make_cache(alone)
    run_stage(store, prepare.stage(shared))
    job = cache.cache_job(shared, "f" * 32)
    count = len(read_manifest(store, job.samples).shards)
    start = threading.Barrier(2)

    def write() -> None:
        actor = cache.TeacherActor(job)
        start.wait()
        for index in range(count):
            actor(cache.decode_shard(pa.table({"shard": [index]}), job))

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(write) for _ in range(2)]:
            done.result()
    manifest = fold_manifest(store, job.targets, targets_table(job.config, job.tapped), count, "f" * 32)
    for info in manifest.shards:
        one, two = (read_shard(s, job.targets, targets_table(job.config, job.tapped), info) for s in (store, expected))
        assert one.equals(two)
    left = [p.name for p in Path(store.path(str(job.targets))).iterdir()]
    assert sorted(left) == sorted([*(s.name for s in manifest.shards), "manifest.json"])


def test_rejects_survive_a_kill_and_a_shard_of_nothing_else_is_no_obstacle(
    run_of: RunOf, settings: dict[str, Any], tmp_path: Path
) -> None:
    records = json.loads(Path(settings["prepare"]["data"]).read_text())[:12]
    for record in records[4:8]:  # the second of three parts
        record["image"] = "nowhere.png"
    records[9]["conversations"] = []
    data = tmp_path / "some.json"
    data.write_text(json.dumps(records))
    run = run_of(prepare={**settings["prepare"], "data": str(data), "on_bad_sample": "skip"})
    store = make_cache(run)
    manifest, done = read_manifest(store, run.ref("prepare")), require(store, run.ref("prepare"))
    assert manifest.shard_rows == (4, 0, 3)
    assert (done.result["samples"], done.result["rejected"], done.result["shards"]) == (7, 5, 3)
    folder = Path(store.path(str(run.ref("prepare"))))
    rejects = pq.read_table(folder / "rejects.parquet").to_pylist()
    assert [r["record"] for r in rejects] == [4, 5, 6, 7, 9]
    assert rejects[0]["file"] == str(data)
    assert rejects[0]["reason"].endswith("image: nowhere.png: No such file")
    assert str(tmp_path) not in rejects[0]["reason"]
    before = {p.name: p.read_bytes() for p in folder.glob("*.parquet")}
    for name in ("record.json", "rejects.parquet", "shard-000002.parquet"):
        (folder / name).unlink()
    run_stage(store, prepare.stage(run))
    assert {p.name: p.read_bytes() for p in folder.glob("*.parquet")} == before
    assert require(store, run.ref("prepare")).result == done.result
    assert all(bool(t.isfinite().all()) for t in train(run).values())


def drawn(row: dict[str, Any]) -> Counter[tuple[int, int]]:
    """How often each (position, id) was drawn."""
    positions = np.repeat(np.arange(row["positions"]), np.frombuffer(row["n_unique"], "u1"))
    ids = np.frombuffer(row["ids"], row["ids_dtype"])
    pairs = zip(positions.tolist(), ids.tolist(), strict=True)
    return Counter(dict(zip(pairs, np.frombuffer(row["counts"], "u1").tolist(), strict=True)))


@pytest.mark.gpu
@pytest.mark.parametrize("taps", ["bfloat16", "fp8_e4m3"])
@pytest.mark.parametrize("kind", ["sampled", "top_k", "final_hidden"])
def test_cache_from_a_gpu_is_the_cpus_up_to_rounding(run_of: RunOf, tmp_path: Path, kind: str, taps: str) -> None:
    section = {"targets": {"kind": kind}, "positions": "all", "taps": {"fraction": 0.5, "dtype": taps}}
    here, there = (
        run_of(store=str(tmp_path / device), cache=section, placement={"device": device, "prepare": {"workers": 0}})
        for device in ("cpu", "cuda")
    )
    table, ref = targets_table(here.cache, tapped_layers(here)), here.ref("cache")
    mine, theirs = make_cache(here), make_cache(there)
    moved = 0
    for info, other in zip(read_manifest(mine, ref).shards, read_manifest(theirs, ref).shards, strict=True):
        one, two = (read_shard(s, ref, table, i).to_pylist() for s, i in ((mine, info), (theirs, other)))
        for a, b in zip(one, two, strict=True):
            assert (a["sample_id"], a["positions"]) == (b["sample_id"], b["positions"])
            if kind == "sampled":
                moved += (drawn(a) - drawn(b)).total()
            elif kind == "top_k":
                assert a["ids"] == b["ids"]
            for name, dtype in {**STATISTICS, "logprobs": "<f2"}.items():
                values = [
                    torch.from_numpy(np.frombuffer(row[name], dtype).astype("f4")) for row in (a, b) if name in row
                ]
                if values:
                    torch.testing.assert_close(*values, rtol=2 * FLOAT16_LOGPROB, atol=FLOAT32_LOGITS)
            for name in (n for n in a if n.startswith("tap_") and not n.endswith("_scale") and a[n] is not None):
                values = [
                    decode_activation(name, row, len(a[name]) // 32 // (2 if taps == "bfloat16" else 1), taps).wide()
                    for row in (a, b)
                ]  # type: ignore[arg-type]
                assert float((values[0] - values[1]).norm() / values[0].norm()) < BFLOAT16_RELATIVE
    # a draw moves where rounding takes the distribution across it, one of a million; of these 170,000 five never do
    assert moved < 5
