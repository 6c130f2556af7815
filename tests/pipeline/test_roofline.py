"""The roofline's arithmetic against the table of Phi-2-class hybrids on an H200 that was made with other code.

What the table does not print follows from its digits: the weights are 5.6e9 bytes, all read at every step; a replaced
layer has (2,560 + 32) · 2,560 more parameters (rows for the gate and the step sizes) of 2 bytes; its state is
819,200 + 61,440 bytes (four columns of the convolution, where ours keeps three).
"""

from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from pipeline import roofline
from pipeline.models import build_model
from pipeline.ops.opset import TORCH
from pipeline.roofline import Footprint, KeptLayer, copy_bandwidth, footprint
from pipeline.surgery import replace_layers
from schemas.layers import LayersConfig, plan_layers
from tests.decoders import COMMON, build, hybrid, tinyllava

BANDWIDTH, WEIGHTS, LAYERS, TOKEN = 4.3e12, int(5.6e9), 32, 10240
MORE_WEIGHTS, STATE = (2560 + 32) * 2560 * 2, 819200 + 61440
REPLACED = (8, 16, 24, 32)

# batch, context: teacher's ms a step, tokens/s, × at 25/50/75/100 %, teacher's GB, GB at 25/50/75/100 %.
TABLE = """
1 1k 1.38 724 0.99 0.99 0.98 0.98 5.9 6.0 6.0 6.0 6.1
1 2k 1.46 686 1.01 1.02 1.02 1.03 6.3 6.2 6.2 6.1 6.1
1 4k 1.61 619 1.03 1.07 1.10 1.14 6.9 6.7 6.5 6.3 6.1
1 8k 1.93 519 1.07 1.15 1.25 1.36 8.3 7.7 7.2 6.6 6.1
1 16k 2.55 392 1.13 1.29 1.50 1.80 11.0 9.7 8.5 7.3 6.1
1 32k 3.80 263 1.19 1.46 1.89 2.69 16.3 13.8 11.2 8.6 6.1
1 64k 6.30 159 1.24 1.63 2.39 4.45 27.1 21.8 16.6 11.3 6.1
8 1k 1.93 4152 1.06 1.12 1.20 1.28 8.3 7.8 7.3 6.8 6.3
8 2k 2.55 3136 1.11 1.26 1.44 1.69 11.0 9.8 8.6 7.4 6.3
8 4k 3.80 2106 1.18 1.43 1.83 2.52 16.3 13.8 11.3 8.8 6.3
8 8k 6.30 1271 1.23 1.61 2.33 4.18 27.1 21.9 16.7 11.5 6.3
8 16k 11.29 709 1.28 1.76 2.86 7.50 48.5 38.0 27.4 16.8 6.3
8 32k 21.28 376 1.30 1.87 3.30 14.13 91.5 70.2 48.9 27.6 6.3
8 64k 41.26 194 1.32 1.93 3.61 27.40 177.4 134.6 91.8 49.0 6.3
16 1k 2.55 6272 1.10 1.23 1.38 1.58 11.0 9.8 8.7 7.6 6.5
16 2k 3.80 4211 1.17 1.40 1.76 2.36 16.3 13.9 11.4 8.9 6.5
16 4k 6.30 2541 1.23 1.59 2.26 3.91 27.1 21.9 16.8 11.6 6.5
16 8k 11.29 1417 1.27 1.75 2.80 7.01 48.5 38.0 27.5 17.0 6.5
16 16k 21.28 752 1.30 1.86 3.26 13.21 91.5 70.2 49.0 27.7 6.5
16 32k 41.26 388 1.32 1.92 3.58 25.61 177.4 134.7 91.9 49.2 6.5
16 64k 81.21 197 1.32 1.96 3.78 50.42 349.2 263.5 177.8 92.2 6.5
64 1k 6.30 10164 1.19 1.48 1.93 2.81 27.1 22.3 17.5 12.6 7.8
64 2k 11.29 5668 1.25 1.67 2.51 5.04 48.5 38.4 28.2 18.0 7.8
64 4k 21.28 3008 1.29 1.81 3.04 9.50 91.5 70.6 49.7 28.7 7.8
64 8k 41.26 1551 1.31 1.90 3.44 18.42 177.4 135.0 92.6 50.2 7.8
64 16k 81.21 788 1.32 1.95 3.69 36.25 349.2 263.9 178.5 93.2 7.8
64 32k 161.12 397 1.33 1.97 3.84 71.93 692.8 521.6 350.3 179.1 7.8
64 64k 320.93 199 1.33 1.99 3.92 143.27 1380.0 1036.9 693.9 350.9 7.8
"""
# Context: largest batch and its tokens/s at 0/25/50/75 % in 141 GB less 10; at 100 % see the test.
SATURATED = """
1k 373 12266 484 15493 688 21037 1191 32793
4k 93 3066 123 4030 182 5881 350 10894
16k 23 766 31 1018 46 1515 91 2967
32k 11 382 15 509 23 761 46 1506
64k 5 190 7 254 11 381 23 759
"""
# New tokens after 768: mean speed-up at 25/50/75/100 %, batch 1.
GENERATED = """
256 0.99 0.98 0.98 0.97
1024 1.00 0.99 0.99 0.99
4096 1.02 1.04 1.05 1.07
16384 1.08 1.17 1.28 1.40
32768 1.13 1.30 1.52 1.85
65536 1.19 1.46 1.91 2.73
"""
# A Llama of 8B with grouped queries: batch, context: × at 50/75 %.
GROUPED = """
1 4k 1.01 1.02
1 16k 1.06 1.09
1 64k 1.21 1.35
16 4k 1.15 1.24
16 16k 1.47 1.92
16 64k 1.79 2.95
64 4k 1.34 1.62
64 16k 1.72 2.70
64 64k 1.92 3.54
"""


def rows(table: str) -> list[list[str]]:
    return [
        [str(int(c[:-1]) * 1024) if c.endswith("k") else c for c in line.split()] for line in table.split("\n")[1:-1]
    ]


def phi2(replaced: int) -> Footprint:
    weights = WEIGHTS + replaced * MORE_WEIGHTS
    return Footprint(weights, weights, (KeptLayer(TOKEN),) * (LAYERS - replaced), replaced * STATE)


def grouped(replaced: int) -> Footprint:
    weights = int(16.06e9)
    return Footprint(weights, weights, (KeptLayer(4096),) * (LAYERS - replaced), replaced * 2097152)


def test_every_row_of_the_table_comes_out_to_its_printed_digits() -> None:
    teacher = phi2(0)
    for batch, context, *printed in rows(TABLE):
        b, c = int(batch), int(context)
        rate = teacher.tokens_per_second(b, c, BANDWIDTH)
        speeds = [phi2(k).tokens_per_second(b, c, BANDWIDTH) / rate for k in REPLACED]
        memory = [phi2(k).memory_bytes(b, c) / 1e9 for k in (0, *REPLACED)]
        found = [f"{1000 * b / rate:.2f}", f"{rate:.0f}", *(f"{s:.2f}" for s in speeds), *(f"{m:.1f}" for m in memory)]
        assert found == printed, (batch, context)
    assert len(rows(TABLE)) == 28


def test_a_replaced_layer_pays_from_86_tokens_on_in_memory_and_172_in_traffic() -> None:
    one, none = (Footprint(0, 0, (KeptLayer(TOKEN),) * (2 - k), k * STATE) for k in (1, 0))
    assert one.memory_bytes(3, 86) == none.memory_bytes(3, 86)
    assert one.memory_bytes(3, 87) < none.memory_bytes(3, 87)
    assert one.step_bytes(3, 172) == none.step_bytes(3, 172)


def test_largest_batches_and_their_rates_are_the_tables() -> None:
    memory = 141e9 - 10e9
    for context, *printed in rows(SATURATED):
        found = []
        for k in (0, 8, 16, 24):
            batch = phi2(k).largest_batch(memory, int(context))
            found += [str(batch), f"{phi2(k).tokens_per_second(batch, int(context), BANDWIDTH):.0f}"]
        assert found == printed
    # the table says 4435 without attention, for which 131 GB are 5 MB too little; the rate is the same in its digits
    assert phi2(32).largest_batch(memory, 1024) == 4434
    assert 0 < phi2(32).memory_bytes(4435, 1024) - memory < 6e6
    assert f"{phi2(32).tokens_per_second(4435, 1024, BANDWIDTH):.0f}" == "74498"


def test_a_model_larger_than_the_memory_has_no_batch() -> None:
    assert phi2(0).largest_batch(5e9, 1024) == 0


def test_mean_speed_up_over_a_generation_is_the_tables() -> None:
    for count, *printed in rows(GENERATED):
        moved = [phi2(k).decode_bytes(1, 768, int(count)) for k in (0, *REPLACED)]
        assert [f"{moved[0] / m:.2f}" for m in moved[1:]] == printed


def test_rate_over_steps_is_tokens_over_the_time_of_each() -> None:
    model = phi2(8)
    seconds = sum(model.step_bytes(4, 100 + i) / BANDWIDTH for i in (1, 2, 3))
    assert model.tokens_per_second(4, 100, BANDWIDTH, 3) == pytest.approx(4 * 3 / seconds, rel=1e-12)


@pytest.mark.parametrize("window", [None, 3, 12, 100, 1000])
def test_bytes_of_many_steps_are_the_sum_of_each(window: int | None) -> None:
    model = Footprint(7, 5, (KeptLayer(10, window), KeptLayer(4)), 3)
    for context, steps in ((0, 1), (5, 20), (12, 4), (90, 30)):
        assert model.decode_bytes(2, context, steps) == sum(
            model.step_bytes(2, context + step) for step in range(1, steps + 1)
        )


def test_grouped_queries_gain_less_as_the_table_has_it() -> None:
    for batch, context, *printed in rows(GROUPED):
        b, c = int(batch), int(context)
        teacher = grouped(0).step_bytes(b, c)
        assert [f"{teacher / grouped(k).step_bytes(b, c):.2f}" for k in (16, 24)] == printed


def test_phi_2_has_the_tables_bytes_by_its_own_tensors() -> None:
    with torch.device("meta"):
        teacher, student = (build_model(tinyllava(), torch.bfloat16) for _ in range(2))
        replace_layers(student, plan_layers(LayersConfig(ratio=0.25), LAYERS), bias=False, ops=TORCH)
    full, mixed = footprint(teacher), footprint(student)
    assert full.cached_bytes(1) == 327680
    assert mixed.cached_bytes(1000) == 24 * 10240 * 1000
    assert (full.states, mixed.states) == (0, 8 * (819200 + 61440 * 3 // 4))
    small = 7680 * 4 + 7680 + 2560 - 4 * 2560  # the convolution and the norm, less the biases of the attention
    heads = 3 * 32  # decays, skips and biases of the step sizes; float32 but on the meta device
    assert mixed.read - full.read == 8 * (MORE_WEIGHTS + (small + heads) * 2)
    assert mixed.held - full.held == mixed.read - full.read
    # a step needs neither tower nor connector nor the table of embeddings
    tower = sum(p.numel() for n, p in teacher.named_parameters() if "vision" in n or "projector" in n)
    buffers = sum(b.numel() * b.element_size() for b in teacher.buffers())
    assert full.held - full.read == 2 * (tower + 51200 * 2560) + buffers


def test_tied_embeddings_are_read_once() -> None:
    model, alone = build("gemma"), build("llama")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    parameters = sum(p.numel() * 4 for p in model.parameters())
    assert footprint(model).read == parameters
    assert footprint(alone).read == sum(p.numel() * 4 for p in alone.parameters()) - 96 * 32 * 4


def test_layers_with_a_window_stop_growing() -> None:
    model = MistralForCausalLM(MistralConfig(**COMMON, sliding_window=16))
    found = footprint(model)
    assert found.cached_bytes(10) == 10 * found.cached_bytes(1)
    assert found.cached_bytes(500) == found.cached_bytes(16) == 16 * 4 * 2 * 2 * 8 * 4


@pytest.mark.parametrize("replaced", [(), (0,), (1, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("family", ["phi", "qwen3"])
def test_formula_counts_exactly_what_a_cache_holds(family: str, replaced: tuple[int, ...]) -> None:
    model = hybrid(build(family), replaced) if replaced else build(family)
    cache = model(torch.ones(3, 20, dtype=torch.long), use_cache=True).past_key_values
    held = 0
    for layer in cache.layers:
        tensors: list[Any] = [layer.keys, layer.values]
        if layer.keys is None:
            tensors = [layer.conv_states[0], layer.recurrent_states[0]]
        held += sum(t.numel() * t.element_size() for t in tensors)
    found = footprint(model)
    assert held == found.memory_bytes(3, 20) - found.held


def test_bandwidth_counts_bytes_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(t for i in range(roofline.COPIES) for t in (i, i + 0.5 + 0.001 * i))
    monkeypatch.setattr(roofline, "settled", lambda _: next(clock))
    found = copy_bandwidth(torch.device("cpu"), size=1000)
    assert found.most == 2 * 1000 / 0.5
    assert found.median == pytest.approx(2000 / (0.5 + 0.001 * (roofline.COPIES // 2)))
    assert found.least < found.median < found.most


def test_a_real_copy_has_a_rate() -> None:
    found = copy_bandwidth(torch.device("cpu"), size=2**20)
    assert 1e6 < found.least <= found.median <= found.most
