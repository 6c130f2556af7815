"""Students of several teachers: their caches' targets mixed by weight, and which caches are refused."""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from cluster.session import session
from jobs import cache, distill, prepare
from jobs.sources import sources_of
from jobs.stages import layer_plan, open_store, run_named, teacher_digests
from jobs.train import WEIGHTS
from pipeline.divergences import target_term
from pipeline.losses import full_kl, head_loss, target_kl
from pipeline.models import body, head, load_model
from pipeline.ops.opset import TORCH
from pipeline.shards import fold_manifest, read_manifest, read_shard, write_shard
from pipeline.stage import require, run_stage
from pipeline.student import apply_trained, build_student
from pipeline.surgery import mixers, trainable_names
from pipeline.targets import SparseTargets
from pipeline.training.batch import Batch
from pipeline.training.objective import DistillObjective, LayerObjective
from schemas.config import RunConfig
from schemas.errors import ArtifactDrift, ArtifactMissing, ConfigInvalid, ShardCorrupt
from schemas.recipe import DistillConfig, DistillPhase, LossWeights
from tests.conftest import tiny_model
from tests.pipeline.test_training import WORKER, batches_of, curve_of, make_cache, make_targets, train, whole_step
from tests.tolerances import ENGINE_CURVE, FLOAT32_GRADIENT

RunOf = Callable[..., RunConfig]
PHASE = {"kind": "distill", "steps": 6, "batch": 4, "lr": 1e-3}
SHARES = (0.25, 0.75)
MIXED = {"phases": [PHASE], "teachers": [{"cache": "other@1", "weight": 3.0}], "checkpoint_every": 2}


@pytest.fixture
def other_teacher(tiny_teacher: Path, tmp_path: Path) -> Path:
    """Another model with the same processor."""
    return saved(tiny_model(seed=1), tiny_teacher, tmp_path / "other")


def saved(model: PreTrainedModel, processor: Path, folder: Path) -> Path:
    """The model beside the processor files of another teacher."""
    model.save_pretrained(folder)
    for file in processor.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def other_of(run_of: RunOf, other_teacher: Path) -> RunOf:
    """Makes runs of the other teacher over the samples of the first one's run."""
    samples = run_of().prepare.model_dump() | {"artifact": "tiny@1"}

    def make(teacher: Path = other_teacher, **sections: Any) -> RunConfig:
        return run_of(**{"name": "other", "teacher": {"path": str(teacher)}, "prepare": samples} | sections)

    return make


def objective_of(model: PreTrainedModel, teachers: Sequence[tuple[float, float]]) -> DistillObjective:
    """The divergence alone."""
    recipe = DistillConfig.model_validate({"phases": [PHASE]})
    layer = LayerObjective(mixers(model), recipe, dict.fromkeys(mixers(model), 1.0), None)
    return DistillObjective(model, layer, LossWeights(layer=0), teachers, recipe)


def student_of(run: RunConfig) -> PreTrainedModel:
    model = build_student(run.teacher, layer_plan(run), "mimic", 0, torch.float32, WORKER.device, TORCH)
    for name in trainable_names(model):
        model.get_parameter(name).requires_grad_()
    return model


def step_of(model: PreTrainedModel, run: RunConfig) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients and metrics of one step of eight samples from the run's caches."""
    batches = batches_of(run, ())
    batch = whole_step(batches, DistillPhase(kind="distill", steps=1, batch=8))
    teachers = [(s.share, s.cache.targets.temperature) for s in batches.sources]
    loss, metrics = objective_of(model, teachers)(batch)
    names = trainable_names(model)
    gradients = torch.autograd.grad(loss, [model.get_parameter(n) for n in names])
    return loss, dict(zip(names, gradients, strict=True)), metrics


KINDS: dict[str, dict[str, Any]] = {
    "sampled": {"kind": "sampled", "draws": 20, "temperature": 2.0},
    "top_k": {"kind": "top_k", "temperature": 2.0},
    "final_hidden": {"kind": "final_hidden"},
}


@pytest.mark.parametrize(("own", "others"), [("sampled", "top_k"), ("final_hidden", "sampled")])
def test_step_from_two_caches_is_the_weighted_sum_of_a_step_from_each(
    run_of: RunOf, other_of: RunOf, own: str, others: str
) -> None:
    alone = run_of(cache={"targets": KINDS[own], "taps": {"fraction": 0}})
    other = other_of(cache={"targets": KINDS[others], "taps": {"fraction": 0}})
    make_cache(alone)
    make_cache(other)
    mixed = alone.model_copy(update={"distill": DistillConfig.model_validate(MIXED)})
    assert tuple(s.share for s in sources_of(mixed)) == SHARES
    model = student_of(alone)
    loss, gradients, metrics = step_of(model, mixed)
    parts = [step_of(model, run) for run in (alone, other)]
    expected = sum(share * part[0] for share, part in zip(SHARES, parts, strict=True))
    torch.testing.assert_close(loss, expected, rtol=FLOAT32_GRADIENT, atol=FLOAT32_GRADIENT)
    torch.testing.assert_close(metrics["kl"], loss)
    for number, part in enumerate(parts):
        torch.testing.assert_close(metrics[f"kl_{number}"], part[2]["kl"])
    for name, gradient in gradients.items():
        whole = sum(share * part[1][name] for share, part in zip(SHARES, parts, strict=True))
        torch.testing.assert_close(gradient, whole, rtol=FLOAT32_GRADIENT, atol=FLOAT32_GRADIENT)
    far = torch.cat([(parts[0][1][name] - parts[1][1][name]).flatten() for name in gradients])
    assert float(far.norm()) > 0.1, "two teachers that ask for the same show nothing"


def test_gradient_to_two_teachers_draws_is_that_to_the_draws_together(run_of: RunOf, other_of: RunOf) -> None:
    run = run_of(distill=MIXED)
    make_cache(run)
    make_cache(other_of())
    batch = whole_step(batches_of(run, ()), DistillPhase(kind="distill", steps=1, batch=8))
    model = student_of(run)
    hidden = torch.randn(len(batch.gold), 32, generator=torch.Generator().manual_seed(0)).requires_grad_()  # type: ignore[arg-type]
    targets: list[Any] = [batch.targets, *batch.others]
    terms = [(share, target_term(head(model), t, 1.0)) for share, t in zip(SHARES, targets, strict=True)]
    (mixed,) = torch.autograd.grad(head_loss(hidden, head(model), terms)[0], hidden)
    together = merged(targets, len(hidden), head(model).out_features)
    (expected,) = torch.autograd.grad(target_kl(hidden, head(model), together, 1.0), hidden)
    torch.testing.assert_close(mixed, expected, rtol=FLOAT32_GRADIENT, atol=FLOAT32_GRADIENT)


def merged(targets: list[SparseTargets], positions: int, vocabulary: int) -> SparseTargets:
    """The draws of several teachers as one's, each counted by its teacher's share."""
    share = torch.zeros(positions, vocabulary)
    for weight, found in zip(SHARES, targets, strict=True):
        share[found.row, found.ids] += weight * found.share
    row, ids = share.nonzero(as_tuple=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(row, minlength=positions).cumsum(0)])
    return SparseTargets(ids, share[row, ids], row, torch.zeros(positions), offsets)


@pytest.mark.slow  # three trainings; loss and gradient of a mixture are tested without one
def test_student_of_two_teachers_is_nearer_to_each_than_the_others_student(run_of: RunOf, other_of: RunOf) -> None:
    recipe = {"phases": [{**PHASE, "steps": 40, "batch": 8, "lr": 3e-3}], "clip": 1.0, "validation": {"fraction": 0.3}}
    mixed = {**recipe, "teachers": [{"cache": "other@1"}]}
    first = run_of(distill={**recipe, "artifact": "first@1"})
    both = run_of(distill={**mixed, "artifact": "both@1"})
    # the own cache cannot be left out: the second's student has it for a ten-thousandth
    second = run_of(distill={**mixed, "artifact": "second@1", "own_weight": 1e-4})
    make_cache(first)
    make_cache(other := other_of())
    near, between, far = (held_out(run, (first, other)) for run in (first, both, second))
    print(f"held-out KL to each teacher: first's student {near}, both's {between}, second's {far}")
    assert near[0] < between[0] < far[0]
    assert far[1] < between[1] < near[1]


def held_out(run: RunConfig, teachers: Sequence[RunConfig]) -> list[float]:
    """Mean KL of the run's trained student to teachers that run here, on samples that it was not trained on."""
    train(run)
    model, where = student_of(run).requires_grad_(False), f"{run.ref('distill')}/{WEIGHTS}"
    apply_trained(model, open_store(run).read(where), where)
    batches = list(batches_of(run, ()).held_out(0, 1, WORKER.device, even=False))
    found = []
    for teacher in teachers:
        other = load_model(teacher.teacher, torch.float32, WORKER.device)
        kl = [full_kl(logits_of(other, batch), logits_of(model, batch)) for batch in batches]
        found.append(float(torch.cat(kl).mean()))
    return found


@torch.no_grad()
def logits_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    assert batch.positions is not None
    hidden = body(model)(**batch.inputs, use_cache=False).last_hidden_state
    found: Tensor = head(model)(hidden[batch.positions[:, 0], batch.positions[:, 1]])
    return found


class Killed(BaseException):
    pass


def test_training_from_two_caches_resumes_to_identical_weights_and_curve(run_of: RunOf, other_of: RunOf) -> None:
    run, twice = run_of(distill=MIXED), run_of(distill={**MIXED, "artifact": "twice@1"})
    make_cache(run)
    make_cache(other_of())

    def die(entry: dict[str, Any]) -> None:
        if entry["step"] == 4:
            raise Killed

    with pytest.raises(Killed):
        train(twice, die)
    resumed, whole = train(twice), train(run)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert curve_of(twice) == curve_of(run)
    last = curve_of(run)[-1]
    assert last["kl"] == pytest.approx(0.25 * last["kl_0"] + 0.75 * last["kl_1"], abs=1e-5)  # the log has six digits


def test_other_caches_and_weights_are_the_students_identity_and_their_absence_is_not(
    run_of: RunOf, other_of: RunOf
) -> None:
    alone, run = run_of(), run_of(distill=MIXED)
    store = make_cache(run)
    make_cache(other_of())
    assert {"teachers", "own_weight"}.isdisjoint(distill.stage(alone).settings)
    assert other_of().ref("cache") in distill.stage(run).inputs
    planned = distill.stage(run)
    heavier = distill.stage(run_of(distill={**MIXED, "own_weight": 2.0}))
    run_stage(store, type(planned)(planned.ref, planned.inputs, planned.settings, lambda *_: {}))
    with pytest.raises(ArtifactDrift, match=r"own_weight: 1\.0 -> 2\.0"):
        run_stage(store, heavier)


def test_weights_that_do_not_mix_are_refused(run_of: RunOf) -> None:
    def refused(match: str, **section: Any) -> None:
        with pytest.raises(ValidationError, match=match):
            run_of(distill={**MIXED, **section})

    refused("teachers.0.weight", teachers=[{"cache": "other@1", "weight": 0}])
    refused("own_weight", own_weight=0)
    refused("other@1 more than once", teachers=[{"cache": "other@1"}, {"cache": "other@1"}])
    refused("cannot give divergence `jsd`", divergence="jsd")
    with pytest.raises(ConfigInvalid, match=r"teachers\.0\.cache: tiny@1 is the run's own cache; distill\.own_weight"):
        distill.stage(run_of(distill={**MIXED, "teachers": [{"cache": "tiny@1"}]}))


def test_other_cache_that_is_missing_or_unfinished_is_named_with_what_to_do(run_of: RunOf, other_of: RunOf) -> None:
    run, other = run_of(distill=MIXED), other_of()
    store = make_cache(run)
    with pytest.raises(ArtifactMissing, match=r"teachers\.0\.cache: .*other@1: does not exist; run `decant cache`"):
        distill.stage(run)
    make_cache(other)
    distill.stage(run)
    store.remove(other.ref("cache").record_path)
    with pytest.raises(ArtifactMissing, match=r"teachers\.0\.cache: .*other@1: is unfinished; run `decant cache`"):
        distill.stage(run)


@pytest.mark.parametrize(
    ("sections", "error", "match"),
    [
        (
            {"prepare": {"artifact": "longer@1", "max_length": 120}},
            ArtifactDrift,
            "other samples .prepare/longer@1. .*",
        ),
        ({"cache": {"positions": "text"}}, ConfigInvalid, "at `text` positions, this run's own cache at `response`"),
        ({"cache": {"targets": KINDS["final_hidden"]}}, ConfigInvalid, "`final_hidden` targets, which need the head"),
    ],
)
def test_other_cache_that_cannot_stand_beside_the_own_is_refused(
    run_of: RunOf, other_of: RunOf, sections: dict[str, Any], error: type[Exception], match: str
) -> None:
    run = run_of(distill=MIXED)
    make_cache(run)
    samples = run.prepare.model_dump() | {"artifact": "tiny@1"}
    make_cache(other_of(**{**sections, "prepare": samples | sections.get("prepare", {})}))
    with pytest.raises(error, match=rf"^distill\.teachers\.0\.cache: .*other@1: .*{match}"):
        distill.stage(run)


def changed(folder: Path, name: str) -> None:
    """A file of the folder in other bytes that say the same."""
    (folder / name).write_text((folder / name).read_text() + "\n")


def test_teacher_with_another_tokenizer_neither_caches_these_samples_nor_is_mixed_in(
    run_of: RunOf, other_of: RunOf, other_teacher: Path
) -> None:
    run = run_of(distill=MIXED)
    store = make_cache(run)
    changed(other_teacher, "tokenizer_config.json")
    cache.check_tokenizer(store, other_of())
    changed(other_teacher, "tokenizer.json")
    teacher_digests.cache_clear()
    other = other_of()
    with pytest.raises(ConfigInvalid, match=r"teacher\.path: .*than prepare/tiny@1 was made with \(tokenizer\.json"):
        run_stage(store, cache.stage(other))
    assert not store.names(str(other.ref("cache")))
    make_targets(other)
    with pytest.raises(ConfigInvalid, match=r"teachers\.0\.cache: .*another tokenizer.*\(tokenizer\.json differ\)"):
        distill.stage(run)


def test_teacher_whose_template_differs_is_mixed_in(run_of: RunOf, other_of: RunOf, other_teacher: Path) -> None:
    run = run_of(distill=MIXED)
    store = make_cache(run)
    template = next(f.name for f in other_teacher.iterdir() if "chat_template" in f.name)
    changed(other_teacher, template)
    other = other_of()
    with pytest.raises(ArtifactDrift, match="chat_template"):
        run_stage(store, prepare.stage(other))
    make_targets(other)
    distill.stage(run)
    assert train(run)


def test_token_beyond_the_students_vocabulary_is_named_with_its_shard(
    run_of: RunOf, other_of: RunOf, tiny_teacher: Path, tmp_path: Path
) -> None:
    model = tiny_model(seed=1)
    size = head(model).out_features
    model.resize_token_embeddings(size + 8, mean_resizing=False)
    head(model).weight.data[size:] *= 100  # what pads a vocabulary is hardly ever said, but by this teacher
    other = other_of(teacher=saved(model, tiny_teacher, tmp_path / "wider"))
    run = run_of(distill=MIXED)
    make_cache(run)
    make_cache(other)
    said = rf"other@1/shard-\d+\.parquet: \w+ has token (\d+), but the student's vocabulary ends at {size - 1}:"
    with pytest.raises(ShardCorrupt, match=said) as error:
        train(run)
    found = re.search(said, str(error.value))
    assert found
    assert size <= int(found[1]) < size + 8


def rewritten(run: RunConfig, change: Callable[[dict[str, list[Any]]], None]) -> None:
    """The run's cache, finished, with other rows in its first shard."""
    store, ref, table = open_store(run), run.ref("cache"), sources_of(run)[0].table
    infos, fingerprint = read_manifest(store, ref).shards, require(store, ref).fingerprint
    columns = read_shard(store, ref, table, infos[0]).to_pydict()
    change(columns)
    write_shard(store, ref, table, 0, columns, fingerprint)
    fold_manifest(store, ref, table, len(infos), fingerprint)


def test_rows_of_other_samples_or_positions_end_the_training(run_of: RunOf, other_of: RunOf) -> None:
    run, other = run_of(distill=MIXED), other_of()
    make_cache(run)
    make_cache(other)

    def shuffle(columns: dict[str, list[Any]]) -> None:
        columns["sample_id"].reverse()

    def lengthen(columns: dict[str, list[Any]]) -> None:
        columns["positions"][0] += 1

    rewritten(other, shuffle)
    with pytest.raises(ShardCorrupt, match=r"cache/other@1: row of \w+ stands beside"):
        train(run)
    rewritten(other, lengthen)
    with pytest.raises(ShardCorrupt, match=r"other@1/shard-000000\.parquet: .*as many positions as cache/tiny@1's"):
        train(run)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning:ray")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_two_teachers_cache_one_after_the_other_and_two_workers_train_their_student(
    run_of: RunOf, other_of: RunOf, other_teacher: Path
) -> None:
    placement = {
        "prepare": {"workers": 0},
        "cache": {"workers": 1, "cpus_per_worker": 0.75, "batch": 3, "decoders": 1},
        "distill": {"workers": 2},
    }
    run, other = run_of(distill=MIXED, placement=placement), other_of(placement=placement)
    changed(other_teacher, "tokenizer_config.json")
    with session():
        for name, whose in (("prepare", run), ("cache", run), ("cache", other), ("distill", run)):
            run_named(name, whose, Console(file=io.StringIO()))
    record = require(open_store(run), run.ref("distill"))
    assert record.result["workers"] == 2
    assert record.identity["inputs"]["cache/other@1"] == require(open_store(run), other.ref("cache")).fingerprint
    alone = run_of(distill={**MIXED, "artifact": "alone@1"})
    train(alone)
    assert record.result["last"]["kl_1"] == pytest.approx(curve_of(alone)[-1]["kl_1"], rel=ENGINE_CURVE)
