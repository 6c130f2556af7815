"""The planner's arithmetic against known figures, counted FLOPs and caches that were really written."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from jobs.plan import rates_file
from jobs.stages import layer_plan, tapped_layers
from pipeline.data.encoding import Encoder
from pipeline.data.processors import load_processor
from pipeline.models import load_model
from pipeline.planning.compute import ModelSize, model_size
from pipeline.planning.costs import LEAST_SLICE, Cost, cost
from pipeline.planning.lengths import Lengths, encoded_samples, measure, prepared_samples
from pipeline.planning.signals import Signal, signals
from pipeline.shards import read_manifest
from schemas.accelerators import Rates, load_rates
from schemas.config import CacheConfig, RunConfig, TapsConfig
from schemas.errors import SampleInvalid
from tests.decoders import tinyllava
from tests.pipeline.test_training import make_cache
from tests.tolerances import COUNTED_FLOPS, KNOWN_BYTES, KNOWN_PASS, PLANNED_BYTES

RunOf = Callable[..., RunConfig]
REPLACED = tuple(range(0, 32, 4))


@pytest.fixture(scope="module")
def phi2_siglip(tmp_path_factory: pytest.TempPathFactory) -> ModelSize:
    """TinyLLaVA-Phi-2-SigLIP-3.1B's size, from a configuration without weights."""
    folder = tmp_path_factory.mktemp("llava")
    tinyllava().save_pretrained(folder)
    return model_size(str(folder))


@pytest.fixture
def rates() -> Rates:
    return load_rates(rates_file())


def llava_665k(samples: int = 665_000) -> Lengths:
    """729 image and 371 text tokens a sample, 200 of them answers."""
    return Lengths(
        samples=samples,
        seen=samples,
        tokens=1100.0 * samples,
        squared_tokens=1100.0**2 * samples,
        image_tokens=729.0 * samples,
        response_tokens=200.0 * samples,
        tapped_tokens=1100.0 * samples,
        positions={"response": 200.0 * samples, "text": 371.0 * samples, "all": 1100.0 * samples},
    )


def planned(size: ModelSize, lengths: Lengths, cache: CacheConfig | None = None) -> dict[tuple[str, str], Signal]:
    found = signals(size, lengths, cache or CacheConfig(), 256, (), REPLACED)
    return {(signal.group, signal.name): signal for signal in found}


TAPS = ("inputs and outputs, bfloat16", "replaced 8 layers")
VISION = ("vision features, bfloat16", "the connector's input")
SAMPLED = ("targets at response positions", "sampled, 50 draws")


def h200_cost(
    signal: Signal, size: ModelSize, lengths: Lengths, rates: Rates, passes: float = 2.0, **storage: Any
) -> Cost:
    where = rates.storage.model_copy(update=storage)
    return cost(signal, size, lengths, rates.accelerator("h200"), where, "bfloat16", passes)


@pytest.mark.parametrize(
    ("signal", "terabytes"),
    [
        (SAMPLED, 0.0028),
        (("targets at all positions", "final_hidden bfloat16"), 3.75),
        (("targets at response positions", "final_hidden fp8"), 0.34),
        (("targets at all positions", "full logits bfloat16"), 74.9),
        (TAPS, 59.9),
    ],
)
def test_bytes_of_llava_665k_are_the_known_figures(
    phi2_siglip: ModelSize, signal: tuple[str, str], terabytes: float
) -> None:
    off = KNOWN_BYTES if signal == SAMPLED else PLANNED_BYTES
    assert planned(phi2_siglip, llava_665k())[signal].bytes / 1e12 == pytest.approx(terabytes, rel=off)


def test_one_pass_of_a_3b_teacher_over_llava_665k_takes_four_h200_hours(phi2_siglip: ModelSize, rates: Rates) -> None:
    lengths = llava_665k()
    its = h200_cost(planned(phi2_siglip, lengths)[SAMPLED], phi2_siglip, lengths, rates)
    assert its.pass_seconds / 3600 == pytest.approx(4.0, rel=KNOWN_PASS)
    assert its.pass_dollars == pytest.approx(14.0, rel=KNOWN_PASS)
    assert its.answer == "cache"


def test_taps_of_everything_are_no_cache_but_a_slice_until_passes_and_bandwidth_pay(
    phi2_siglip: ModelSize, rates: Rates
) -> None:
    lengths = llava_665k()
    taps = planned(phi2_siglip, lengths)[TAPS]
    its = h200_cost(taps, phi2_siglip, lengths, rates)
    assert its.dollars_per_month == pytest.approx(1378, rel=0.01)
    assert its.break_even_passes == pytest.approx(97, rel=KNOWN_PASS)
    assert (its.answer, its.largest_fraction) == ("bounded slice", pytest.approx(2 / its.break_even_passes))
    often = h200_cost(taps, phi2_siglip, lengths, rates, passes=2 * its.break_even_passes)
    assert often.answer == "bounded slice"  # it pays, but no node reads 16 GB/s
    assert often.largest_fraction == pytest.approx(rates.storage.read_rate / often.read_bytes_per_second)
    fast = h200_cost(
        taps,
        phi2_siglip,
        lengths,
        rates,
        passes=2 * its.break_even_passes,
        read_gb_per_second=8 * often.read_bytes_per_second / 1e9 + 1,
    )
    assert (fast.answer, fast.largest_fraction) == ("cache", 1.0)


def test_largest_slice_is_itself_worth_caching(phi2_siglip: ModelSize, rates: Rates) -> None:
    lengths = llava_665k()
    share = h200_cost(planned(phi2_siglip, lengths)[TAPS], phi2_siglip, lengths, rates).largest_fraction
    for fraction, answer in ((0.99 * share, "cache"), (1.01 * share, "bounded slice")):
        part = replace(lengths, tapped_tokens=fraction * lengths.tokens)
        cache = CacheConfig(taps=TapsConfig(fraction=fraction))
        (own,) = (s for s in signals(phi2_siglip, part, cache, 256, REPLACED, REPLACED) if s.own and s.fraction)
        assert h200_cost(own, phi2_siglip, part, rates).answer == answer


def test_slice_too_small_to_learn_from_is_recomputed(phi2_siglip: ModelSize, rates: Rates) -> None:
    lengths = llava_665k()
    taps = planned(phi2_siglip, lengths)[TAPS]
    share = h200_cost(taps, phi2_siglip, lengths, rates).largest_fraction
    rare = 2 * LEAST_SLICE / (share * lengths.samples)
    assert h200_cost(taps, phi2_siglip, lengths, rates, passes=1.1 * rare).answer == "bounded slice"
    assert h200_cost(taps, phi2_siglip, lengths, rates, passes=0.9 * rare).answer == "recompute"


def test_storage_for_next_to_nothing_is_always_worth_it(phi2_siglip: ModelSize, rates: Rates) -> None:
    lengths = llava_665k(samples=100)
    its = h200_cost(planned(phi2_siglip, lengths)[TAPS], phi2_siglip, lengths, rates, passes=0, read_gb_per_second=100)
    assert its.break_even_passes > 50
    assert its.answer == "cache"


def test_vision_features_take_the_towers_part_of_the_pass(phi2_siglip: ModelSize, rates: Rates) -> None:
    lengths = llava_665k()
    found = planned(phi2_siglip, lengths)[VISION]
    assert found.bytes == 665_000 * 729 * 1152 * 2
    assert not found.own
    assert planned(phi2_siglip, lengths, CacheConfig(vision="bfloat16"))[VISION].own
    # 0.4 of 3.1 billion parameters see 729 of 1,100 tokens, and attend to all of them
    assert 0.1 < found.spared < 0.15
    its = h200_cost(found, phi2_siglip, lengths, rates)
    whole = h200_cost(replace(found, spared=1.0), phi2_siglip, lengths, rates)
    assert its.pass_seconds == pytest.approx(found.spared * whole.pass_seconds)
    assert its.break_even_passes == pytest.approx(whole.break_even_passes / found.spared)
    assert its.read_bytes_per_second == whole.read_bytes_per_second
    assert VISION not in planned(replace(phi2_siglip, features=0), lengths)


def test_flops_are_those_that_torch_counts() -> None:
    path = "jobs/demo/teacher"
    model = load_model(path, torch.float32, torch.device("cpu"))
    ids = torch.tensor([[3] * 64 + [5] * 14])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, pixel_values=torch.zeros(1, 3, 64, 64))
    lengths = Lengths(1, 1, 78.0, 78.0**2, 64.0, 2.0, 0.0, {})
    assert model_size(path).pass_flops(lengths, 78) == pytest.approx(counter.get_total_flops(), rel=COUNTED_FLOPS)


@pytest.mark.parametrize(
    "cache",
    [
        {"targets": {"kind": "top_k", "k": 5}, "positions": "text"},  # taps of one layer, as by default
        {"targets": {"kind": "final_hidden", "dtype": "fp8_e4m3"}, "positions": "all", "taps": {"fraction": 0}},
        {"targets": {"kind": "final_hidden"}, "taps": {"fraction": 0.5, "targets": "recompute", "dtype": "fp8_e4m3"}},
        {"targets": {"kind": "sampled", "draws": 50}, "taps": {"layers": "all", "fraction": 0.5}},
        {"taps": {"fraction": 0}, "vision": "bfloat16"},
    ],
)
def test_planned_bytes_are_those_of_the_written_cache(run_of: RunOf, cache: dict[str, Any]) -> None:
    run = run_of(cache=cache, prepare={**run_of().prepare.model_dump(), "shard_rows": 16})
    store = make_cache(run)
    size, processor = model_size(run.teacher), load_processor(run.teacher)
    rows, total = prepared_samples(store, run.ref("prepare"))
    lengths = measure(rows, total, run.cache, processor.image_token_id)
    found = signals(size, lengths, run.cache, 16, tapped_layers(run), layer_plan(run).replaced)
    written = sum(shard.bytes for shard in read_manifest(store, run.ref("cache")).shards)
    assert sum(s.bytes for s in found if s.own) == pytest.approx(written, rel=PLANNED_BYTES)


def test_lengths_before_prepare_are_those_after_it(run_of: RunOf) -> None:
    run = run_of()
    processor = load_processor(run.teacher)
    encoder = Encoder(processor, run.prepare.max_length)
    before = measure(*encoded_samples(run.prepare, encoder), run.cache, processor.image_token_id)
    store = make_cache(run)
    after = measure(*prepared_samples(store, run.ref("prepare")), run.cache, processor.image_token_id)
    assert before == after
    assert after.samples == after.seen == 40
    part = measure(*encoded_samples(run.prepare, encoder, count=12), run.cache, processor.image_token_id)
    assert (part.samples, part.seen) == (40, 12)
    assert part.tapped_tokens == run.cache.taps.fraction * part.tokens


def test_part_of_a_table_comes_from_all_over_it(run_of: RunOf) -> None:
    run = run_of()  # ten shards of four
    store = make_cache(run)
    part, total = prepared_samples(store, run.ref("prepare"), 20, images=True)
    assert (len(part), total) == (20, 40)
    assert all(sample.images for sample in part)
    numbers = [int(sample.record.removeprefix("train-")) for sample in part]
    assert sorted({n // 4 for n in numbers}) == list(range(10))
    assert numbers != sorted(numbers)
    assert [s.record for s in prepared_samples(store, run.ref("prepare"), 20)[0]] == [s.record for s in part]


def test_unusable_records_are_left_out_of_the_estimate(run_of: RunOf, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "one"}]
    bad = {"image": "nowhere.png", "conversations": turns}
    good = {"conversations": [{"from": "human", "value": "two"}, turns[1]]}
    data.write_text("".join(json.dumps(r) + "\n" for r in (good, bad, {}, good)))
    run = run_of(prepare={**run_of().prepare.model_dump(), "data": str(data), "on_bad_sample": "skip"})
    encoder = Encoder(load_processor(run.teacher), run.prepare.max_length)
    rows, total = encoded_samples(run.prepare, encoder)
    assert (len(rows), total) == (2, 2)
    strict = run.prepare.model_copy(update={"on_bad_sample": "fail"})
    with pytest.raises(SampleInvalid, match="record 1"):
        encoded_samples(strict, encoder)
