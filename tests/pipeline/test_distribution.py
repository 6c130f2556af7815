"""Distribution figures from a cache's held-out samples, against a restatement over whole vocabularies."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from jobs.stages import open_store
from jobs.train import WEIGHTS
from pipeline.activations import Activation
from pipeline.calibration import bin_sums, calibration_error, reliability
from pipeline.comparison import COLUMNS, compare
from pipeline.models import body, decoder, head, load_model
from pipeline.student import apply_trained
from pipeline.surgery import mixers
from pipeline.taps import is_tapped
from pipeline.targets import HiddenTargets
from pipeline.training.recompute import TeacherLayers
from schemas.config import RunConfig
from tests.pipeline.restated import (
    CPU,
    Restated,
    activation,
    changed,
    measured,
    own_rows,
    restated_error,
    settings_of,
    student_of,
)
from tests.pipeline.test_training import curve_of, make_cache, make_targets, train
from tests.tolerances import BFLOAT16_RELATIVE, FLOAT32_LOGITS, FLOAT32_SCAN, SIGMAS

# Log-probabilities are differences of two sums of logits.
FIGURE = 2 * FLOAT32_LOGITS
CASES: dict[str, dict[str, Any]] = {
    "sampled": {"targets": {"kind": "sampled"}},
    "sampled_warm": {"targets": {"kind": "sampled", "temperature": 2.0}, "taps": {"fraction": 1e-9}},
    "top_k": {"targets": {"kind": "top_k", "k": 8}},
    "top_k_warm": {"targets": {"kind": "top_k", "k": 8, "temperature": 2.0}},
    "final_hidden": {"targets": {"kind": "final_hidden"}, "taps": {"layers": [1], "fraction": 0.5}},
    # with features beside the pixels, which are what the restated student sees
    "all_fp8": {"targets": {"kind": "final_hidden", "dtype": "fp8_e4m3"}, "vision": "bfloat16", "positions": "all"},
}
Runs = dict[str, RunConfig]


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    """Matrices of 32 × 64 take longer on two threads, and twenty times as long where others want the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def runs(tiny_teacher: Path, scenes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """One run a case, all of the same samples."""
    settings = settings_of(tiny_teacher, scenes_folder, tmp_path_factory.mktemp("store"))
    found = {}
    for name, section in CASES.items():
        cache = {"taps": {"fraction": 0.5}, **section, "artifact": f"{name}@1"}
        found[name] = RunConfig.model_validate({**settings, "cache": cache})
        make_cache(found[name])
    return found


@pytest.mark.parametrize("case", CASES)
def test_figures_are_those_of_single_tokens_over_the_whole_vocabulary(runs: Runs, case: str) -> None:
    run = runs[case]
    model = student_of(run)
    found, expected = measured(run, model), Restated(run, model)
    assert (found["samples"], found["tokens"]) == (len(own_rows(run)), expected.tokens)
    kind = run.cache.targets.kind
    assert found["estimate"] == {"sampled": "unbiased", "top_k": "coarse", "final_hidden": "exact"}[kind]
    assert found["kl"]["value"] == pytest.approx(expected.kl / expected.tokens, abs=FIGURE)
    assert found["kl"]["value"] > 0.01
    assert found["top1_agreement"]["value"] == pytest.approx(expected.agrees / expected.tokens)
    assert found["expected_agreement"]["value"] == pytest.approx(expected.expected / expected.tokens, abs=FIGURE)
    assert found["answer_tokens"] == len(expected.ours)
    assert (found["answer_tokens"] < found["tokens"]) == (case == "all_fp8")
    assert found["ece"] == pytest.approx(restated_error(expected.ours), abs=FIGURE)
    if kind == "sampled" or run.cache.targets.temperature != 1:
        assert found["teacher_ece"] is None
        assert found["notes"]["teacher_ece"]
    else:
        assert found["teacher_ece"] == pytest.approx(restated_error(expected.theirs), abs=FIGURE)
        assert "teacher_ece" not in found["notes"]
    for name in ("kl", "top1_agreement", "expected_agreement"):
        low, high = found[name]["ci95"]
        assert low < found[name]["value"] < high
        assert found[name]["n"] == found["samples"]
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("case", ["sampled", "top_k", "final_hidden"])
def test_batch_size_changes_no_figure(runs: Runs, case: str) -> None:
    place = runs[case].placement.model_dump(mode="json")
    found = [
        measured(changed(runs[case], placement={**place, "evaluate": {**place["evaluate"], "batch": batch}}))
        for batch in (1, 32)
    ]
    assert flat(found[0]) == pytest.approx(flat(found[1]), abs=FIGURE)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Numbers by path, in the order of the result; anything else by its text."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, inner in pairs for k, v in flat(inner, f"{name}.{key}").items()}
    return {name: value} if isinstance(value, int | float) else {f"{name}={value}": 0}


@torch.no_grad()
def test_teacher_beside_its_own_states_is_itself_up_to_their_rounding(runs: Runs) -> None:
    """With logits off by at most Δ, the divergence is at most Δ² / 2 (Hoeffding), and a lead of over 2 Δ remains."""
    run = runs["final_hidden"]
    teacher = load_model(run.teacher, torch.float32, CPU)
    found = measured(run, teacher)
    states = torch.cat([activation(row, "hidden") for row in own_rows(run)])
    logits = head(teacher)(states)
    # each channel is off by at most half a unit in the last place
    off = BFLOAT16_RELATIVE * (states.abs() @ head(teacher).weight.abs().T).amax(-1) + FIGURE
    assert len(off) == found["tokens"]
    first, second = logits.topk(2).values.unbind(-1)
    certain = float((first - second > 2 * off).double().mean())
    assert certain > 0.8
    assert certain <= found["top1_agreement"]["value"] <= 1
    assert -FIGURE < found["kl"]["value"] <= float(off.square().mean() / 2)
    assert float(off.square().mean() / 2) < 0.01
    assert found["notes"]["layers"] == "the model has no mixers"
    assert found["layers"] == {}


def test_draws_agree_as_often_as_the_teachers_probabilities_say(runs: Runs) -> None:
    drawn, exact = (measured(runs[case]) for case in ("sampled", "final_hidden"))
    # the share of N draws has at most the variance 1 / 4 N; the states' rounding moves probabilities much less
    noise = 0.5 / math.sqrt(50 * drawn["tokens"])
    assert drawn["expected_agreement"]["value"] == pytest.approx(
        exact["expected_agreement"]["value"], abs=SIGMAS * noise
    )
    coarse = measured(runs["top_k"])
    assert coarse["expected_agreement"]["value"] <= exact["expected_agreement"]["value"] + BFLOAT16_RELATIVE
    assert coarse["kl"]["value"] < exact["kl"]["value"]


def test_calibration_error_by_hand() -> None:
    """Of four bins (0, ¼] has two tokens, (½, ¾] one and (¾, 1] three: an edge belongs to the bin below it."""
    confidence = np.array([0.2, 0.25, 0.6, 0.8, 0.9, 1.0])
    right = np.array([0.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    sums = bin_sums(confidence, right, 4)
    assert sums[:, 0].tolist() == [2, 0, 1, 3]
    # (|1 - 0.45| + |1 - 0.6| + |2 - 2.7|) / 6
    assert calibration_error(sums) == pytest.approx(1.65 / 6)
    assert reliability(sums) == [
        {"confidence": pytest.approx(0.225), "accuracy": 0.5, "share": pytest.approx(1 / 3)},
        {"confidence": pytest.approx(0.6), "accuracy": 1.0, "share": pytest.approx(1 / 6)},
        {"confidence": pytest.approx(0.9), "accuracy": pytest.approx(2 / 3), "share": 0.5},
    ]
    halves = bin_sums(confidence[:3], right[:3], 4) + bin_sums(confidence[3:], right[3:], 4)
    assert np.allclose(halves, sums)
    assert calibration_error(bin_sums(np.array([0.0, 1.0]), np.array([0.0, 1.0]), 4)) == 0


def test_logits_are_never_held_beyond_a_chunk() -> None:
    torch.manual_seed(0)
    output, seen = nn.Linear(6, 23), list[int]()
    output.register_forward_hook(lambda _, __, logits: seen.append(len(logits)))
    states, gold = torch.randn(10, 6), torch.arange(10)
    targets = HiddenTargets(Activation(torch.randn(10, 6).to(torch.bfloat16)))
    (kl, values), (whole_kl, whole) = (compare(output, states, targets, gold, rows=r) for r in (3, None))
    # student, teacher, and the teacher again in the divergence
    assert seen == [3] * 9 + [1] * 3 + [10] * 3
    assert values.shape == (10, len(COLUMNS))
    torch.testing.assert_close(values, whole)
    assert float(kl) == pytest.approx(float(whole_kl), abs=10 * FIGURE)


@torch.no_grad()
def test_layers_errors_are_those_of_single_mixers_on_single_samples(runs: Runs) -> None:
    run = runs["sampled"]
    model = student_of(run)
    tapped = [r for r in own_rows(run) if is_tapped(r["sample_id"], run.cache.taps.fraction, run.cache.seed)]
    assert 0 < len(tapped) < len(own_rows(run))
    found = measured(run, model)
    assert found["tapped_samples"] == len(tapped)
    assert set(found["layers"]) == {"1", "3"}
    for layer, mixer in mixers(model).items():
        error = power = 0.0
        for row in tapped:
            value_in, value_out = (activation(row, f"tap_{layer}_{part}") for part in ("input", "output"))
            error += float((mixer(value_in[None])[0][0] - value_out).square().sum())
            power += float(value_out.square().sum())
        assert found["layers"][str(layer)] == pytest.approx(error / power, rel=2 * FLOAT32_SCAN)
    for parameter in mixers(model)[3].out_proj.parameters():
        parameter.zero_()
    assert measured(run, model)["layers"]["3"] == 1


def test_recomputed_layers_errors_are_those_of_stored_outputs(runs: Runs) -> None:
    stored = runs["sampled"]
    taps = {"fraction": 0.5, "targets": "recompute"}
    run = changed(stored, cache={"taps": taps, "artifact": "recompute@1"})
    make_targets(run)
    assert measured(run)["layers"] == {}
    assert "recompute" in measured(run)["notes"]["layers"]
    attention = dict[int, nn.Module]()
    model = student_of(run, attention)
    found = measured(run, model, attention=TeacherLayers(attention, decoder(model)))
    assert "layers" not in found["notes"]
    # the stored output is the attention's on the exact input, rounded; the other on the rounded input
    assert found["layers"] == pytest.approx(measured(stored)["layers"], rel=4 * BFLOAT16_RELATIVE)


def test_layers_without_taps_are_left_out_and_named(runs: Runs) -> None:
    found = measured(runs["final_hidden"])
    assert set(found["layers"]) == {"1"}
    assert "[3]" in found["notes"]["other_layers"]
    none = measured(runs["sampled_warm"])
    assert (none["layers"], none["tapped_samples"]) == ({}, 0)
    assert f"none of the {none['samples']} samples is tapped" in none["notes"]["layers"]


def test_fewer_samples_are_a_part_of_the_held_out_ones(runs: Runs) -> None:
    run = runs["sampled"]
    every = len(own_rows(run))
    found = {n: measured(run, samples=n) for n in (2, 5, every, 10**6)}
    assert [f["samples"] for f in found.values()] == [2, 5, every, every]
    assert found[every] == found[10**6] == measured(run)
    assert found[2]["tokens"] < found[5]["tokens"] < found[every]["tokens"]
    assert found[5] == measured(run, samples=5)


def test_trained_student_is_as_far_from_the_teacher_as_its_last_validation_says(runs: Runs) -> None:
    run = runs["top_k"]
    train(run)
    store, model = open_store(run), student_of(run)
    before = measured(run, model)
    name = f"{run.ref('distill')}/{WEIGHTS}"
    apply_trained(model, store.read(name), name)
    after, last = measured(run, model), curve_of(run)[-1]
    # logged to six decimals
    assert after["kl"]["value"] == pytest.approx(last["held_out_kl"], abs=1e-6 + FIGURE)
    assert after["top1_agreement"]["value"] == pytest.approx(last["held_out_top1"], abs=1e-6)
    assert after["kl"]["value"] != pytest.approx(before["kl"]["value"], abs=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_gpu_measures_what_the_cpu_does(runs: Runs, case: str) -> None:
    model = student_of(runs[case])
    here = measured(runs[case], model)
    there = measured(runs[case], model.to("cuda"))
    assert body(model).device.type == "cuda"
    # the vision tower's and attention's kernels add up in another order
    assert flat(there) == pytest.approx(flat(here), abs=10 * FIGURE)
