"""MOHAWK's first phase: the matrices of scans and of attention, and what brings one towards the other."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.activations import Activation
from pipeline.data.collate import pad_tokens
from pipeline.initialise import initialise
from pipeline.mixer import Mamba2Mixer
from pipeline.models import body, decoder
from pipeline.ops.reference import ssd_scan
from pipeline.surgery import mixer_dims
from pipeline.taps import recorded
from pipeline.training.batch import Batch, TapBatch, Totals
from pipeline.training.mixing import MatrixObjective, matrix_loss, mixing_matrix, require_matrix
from pipeline.training.recompute import TeacherLayers
from schemas.hybrid import MixerDims
from tests.decoders import FAMILIES, THREE_D, build, randomise, tokens
from tests.tolerances import FLOAT32_LOGITS, FLOAT64

KINDS = {
    "multi-head": MixerDims(hidden=32, heads=4, kv_heads=4, head_dim=8, bias=False),
    "grouped": MixerDims(hidden=32, heads=4, kv_heads=2, head_dim=8, bias=True),
    "normed": MixerDims(hidden=32, heads=4, kv_heads=2, head_dim=8, bias=True, qk_norm=True),
}


def a_mixer(kind: str) -> Mamba2Mixer:
    mixer = Mamba2Mixer(KINDS[kind], 0).double()
    randomise(mixer, 0)
    return mixer


@pytest.mark.parametrize("length", [1, 9, 150])  # the scan has chunks of 128
@pytest.mark.parametrize("kind", KINDS)
def test_matrix_times_x_is_the_scans_output(kind: str, length: int) -> None:
    mixer = a_mixer(kind)
    torch.manual_seed(0)
    u = torch.randn(2, length, 32, dtype=torch.float64)
    given = mixer.scan_inputs(u)
    matrix = mixing_matrix(mixer, u)
    assert torch.equal(matrix, matrix.tril())
    y = torch.einsum("bhij,bjhp->bihp", matrix, given.x)
    torch.testing.assert_close(y, ssd_scan(*given)[0], rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_the_matrix_are_the_scans(kind: str) -> None:
    mixer = a_mixer(kind)
    torch.manual_seed(0)
    u, weight = torch.randn(2, 20, 32, dtype=torch.float64), torch.randn(2, 20, 4, 8, dtype=torch.float64)
    given = mixer.scan_inputs(u)
    y = torch.einsum("bhij,bjhp->bihp", mixing_matrix(mixer, u), given.x)
    before_the_norm = [p for n, p in mixer.named_parameters() if n.partition(".")[0] not in ("norm", "out_proj")]
    mine = torch.autograd.grad((y * weight).sum(), before_the_norm)
    scans = torch.autograd.grad((ssd_scan(*mixer.scan_inputs(u))[0] * weight).sum(), before_the_norm)
    for one, other in zip(mine, scans, strict=True):
        assert bool(one.any())
        torch.testing.assert_close(one, other, rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in THREE_D])
@torch.no_grad()
def test_recomputed_weights_are_the_teachers(family: str) -> None:
    """A right-padded batch through the whole teacher with eager attention, and each layer's module on its input."""
    model, rows = build(family), tokens(5, 11, 2)
    ids, mask = pad_tokens([r.numpy() for r in rows], 0)
    layers: Any = decoder(model).layers
    own = decoder(model).config._attn_implementation
    model.set_attn_implementation("eager")
    with recorded(layers, (0, 3)) as taps:
        expected = body(model)(input_ids=ids, attention_mask=mask, use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation(own)
    teacher = TeacherLayers({i: layers[i].self_attn for i in (0, 3)}, decoder(model))
    found = {i: teacher.weights(i, taps[i][0], mask) for i in taps}
    alone = {i: teacher.weights(i, taps[i][0][1:2]) for i in taps}
    assert decoder(model).config._attn_implementation == own
    for i, weights in found.items():
        real = mask[:, None, :, None].expand_as(weights) == 1
        torch.testing.assert_close(weights[real], expected[i][real], rtol=FLOAT32_LOGITS, atol=FLOAT32_LOGITS)
        torch.testing.assert_close(alone[i], expected[i][1:2], rtol=FLOAT32_LOGITS, atol=FLOAT32_LOGITS)


def test_matrices_of_zeros_lose_one_a_real_token_and_equal_ones_nothing() -> None:
    torch.manual_seed(0)
    weights, mask = torch.rand(3, 4, 6, 6).tril().softmax(-1), torch.arange(6) < torch.tensor([[6], [2], [5]])
    padding = ~mask[:, None, :, None].expand_as(weights)
    assert float(matrix_loss(torch.zeros_like(weights), weights, mask)) == pytest.approx(13)
    assert float(matrix_loss(0.5 * weights, weights, mask)) == pytest.approx(13 / 4)
    # rows of padding mean nothing, not even as no numbers
    assert float(matrix_loss(weights.masked_fill(padding, torch.nan), weights, mask)) == 0
    assert float(matrix_loss(weights, weights.masked_fill(padding, torch.nan), mask)) == 0


def objective(family: str, layers: tuple[int, ...] = (0, 3)) -> tuple[MatrixObjective, TeacherLayers]:
    model = build(family)
    modules: Any = decoder(model).layers
    attention = {i: modules[i].self_attn for i in layers}
    found = {}
    for i, module in attention.items():
        found[i] = Mamba2Mixer(mixer_dims(module, bias=True), i)
        initialise(found[i], module, "mimic", torch.Generator().manual_seed(i))
    teacher = TeacherLayers(attention, decoder(model))
    for mixer in found.values():
        require_matrix(mixer)
    return MatrixObjective(found, teacher), teacher


def tapped(lengths: tuple[int, ...], layers: tuple[int, ...] = (0, 3)) -> Batch:
    torch.manual_seed(0)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    taps = {i: (Activation(torch.randn(*mask.shape, 32).bfloat16() * mask[..., None]), None) for i in layers}
    count = len(lengths)
    totals = Totals(count, 0, 0, tapped=count, tap_tokens=sum(lengths), tokens=sum(lengths))
    return Batch(np.zeros((count, 2), np.int64), True, totals, taps=TapBatch(taps, mask))


def test_objective_is_the_loss_of_the_whole_batchs_matrices() -> None:
    matched, teacher = objective("qwen3")
    batch = tapped((7, 12, 3))
    assert batch.taps is not None
    loss, metrics = matched(batch)
    assert set(metrics) == {"layer_0", "layer_3"}
    torch.testing.assert_close(loss, metrics["layer_0"] + metrics["layer_3"])
    for i, (value, _) in batch.taps.layers.items():
        mixer: Any = matched.mixers[str(i)]
        weights = teacher.weights(i, value.wide(), batch.taps.mask.long())
        whole = matrix_loss(mixing_matrix(mixer, value.wide()), weights, batch.taps.mask) / 22
        torch.testing.assert_close(metrics[f"layer_{i}"], whole)


@pytest.mark.parametrize("family", ["phi", "qwen2", "qwen3"])
def test_matching_lowers_the_loss_and_moves_all_that_makes_the_matrix(family: str) -> None:
    matched, _ = objective(family)
    batch = tapped((12, 8, 5))
    before = {n: p.detach().clone() for n, p in matched.named_parameters()}
    chosen = [p for p in matched.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=3e-3, weight_decay=0)
    losses = []
    for _ in range(30):
        loss, _ = matched(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    moved = {n for n, p in matched.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if n.split(".")[2] not in ("norm", "out_proj")}
    assert all(p.grad is not None for p in chosen)


def test_no_matrix_is_held_between_forward_and_backward() -> None:
    matched, _ = objective("phi", (0,))
    batch = tapped((40, 33), (0,))
    sizes: list[int] = []

    def seen(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda t: t):
        loss, _ = matched(batch)
    assert max(sizes, default=0) < 4 * 33 * 33
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in matched.parameters() if p.grad is not None)


@torch.no_grad()
def test_matrices_keep_float32_under_autocast() -> None:
    mixer = a_mixer("grouped").float()
    torch.manual_seed(0)
    u = torch.randn(1, 30, 32)
    exact = mixing_matrix(mixer, u)
    with torch.autocast("cpu", torch.bfloat16):
        matrix = mixing_matrix(mixer, u)
    assert matrix.dtype == torch.float32
    # inputs, scores and weights are each rounded to eight bits
    assert float((matrix - exact).norm() / exact.norm()) < 0.02
