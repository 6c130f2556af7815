"""The benchmark of the training step runs where there is no GPU, and says ratios."""

import json
import math
from pathlib import Path

import pytest
import torch

from tests.bench import training
from tests.bench.floor import Products
from tests.bench.kernels import Kernel, describe, gaps


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    """Threads would wait for each other longer than they compute."""
    torch.set_num_threads(1)


def test_step_bench_writes_its_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--small", "--eager", "--steps", "1", "--rounds", "1", "--batch", "1", "--tokens", "32", "--tapped", "1"]
    training.main([*sizes, "--layers", "end", "--train", "mixers", "--json", str(tmp_path / "step.json")])
    made = json.loads((tmp_path / "step.json").read_text())
    # all six layers below those that are replaced
    assert "alone: frozen layers, forward alone" in made["sides"]
    assert len(made["ratios"]) == 6
    assert all(math.isfinite(value) and value > 0 for value in made["ratios"].values())
    # one loss, whoever makes the targets
    losses = {name: side["loss"] for name, side in made["sides"].items() if "loss" in side}
    assert losses["online"] == pytest.approx(losses["cached"], rel=1e-3)
    assert "| products alone |" in capsys.readouterr().out


def test_products_are_a_backward_passs_as_well_and_nothing_else() -> None:
    frozen, trained = torch.nn.Linear(8, 8).requires_grad_(False), torch.nn.Linear(8, 8)
    with Products() as products:
        frozen(torch.relu(trained(torch.ones(4, 8)))).sum().backward()
    # both forward, the frozen one's gradient of its input, the trained one's of its weight
    assert len(products.noted) == 4
    products()
    assert {tuple(t.size) for t in products.tensors} >= {(4, 8), (8, 8)}


def test_profile_counts_by_kind_and_finds_the_gaps() -> None:
    kernels = [
        Kernel("nvjet_hsh_128x256", 0, 1000),
        Kernel("_chunk_scan_fwd_kernel", 1500, 2000),
        Kernel("Memcpy HtoD", 1600, 2600),  # beside the scan and over its end
        Kernel("triton_red_fused_native_layer_norm_3", 2600, 2700),
        Kernel("triton_poi_fused_gelu_1", 2900, 3000),
    ]
    assert [k.kind for k in kernels] == ["products", "scan", "copies", "norms", "element-wise and sums"]
    assert [(gap, after.kind) for gap, _, after in gaps(kernels)] == [(500, "scan"), (200, "element-wise and sums")]
    text = describe(kernels, steps=2)
    assert "1.50 ms a step" in text
    assert "0.50 ms products" in text
    assert "0.35 ms in 1 gaps" in text
