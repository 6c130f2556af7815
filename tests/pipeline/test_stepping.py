"""One decoding step's operations: plain against modules, kernels against plain.

The kernels' tests run on CUDA devices, and anywhere under Triton's interpreter: ``TRITON_INTERPRET=1``.
"""

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from pipeline.mixer import D_CONV, Mamba2Mixer
from pipeline.ops.stepping import PLAIN, LayerNorm, MixerWeights, Projection, RmsNorm, StepOps, Term
from pipeline.states import recurrent_layer
from schemas.hybrid import MixerDims
from tests.bench import steps
from tests.decoders import randomise
from tests.tolerances import FLOAT32_STEP, STEP_KERNEL

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# The interpreter has no bfloat16.
TYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]
WITHOUT_TRITON = importlib.util.find_spec("triton") is None or not (INTERPRETED or torch.cuda.is_available())
REASON = "needs a CUDA device, or Triton and TRITON_INTERPRET=1"

MIXERS = {
    "plain": MixerDims(hidden=24, heads=3, kv_heads=3, head_dim=8, bias=True),
    "grouped": MixerDims(hidden=32, heads=4, kv_heads=2, head_dim=8, bias=False),
    "normed": MixerDims(hidden=40, heads=4, kv_heads=2, head_dim=10, bias=False, qk_norm=True),
}
NORMS = ("none", "layer", "layer without bias", "rms")


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device(), dtype)


def norm_of(name: str, size: int, dtype: torch.dtype = torch.float32) -> Any:
    weight, bias = 1.0 + 0.3 * numbers(size, dtype=dtype), numbers(size, dtype=dtype, seed=1)
    if name == "rms":
        return RmsNorm(weight, 1e-5)
    return None if name == "none" else LayerNorm(weight, None if "without" in name else bias, 1e-5)


@pytest.mark.parametrize("name", NORMS)
def test_project_is_norm_linear_and_activation(name: str) -> None:
    x, norm = numbers(3, 12), norm_of(name, 12)
    weight, bias, gate = numbers(5, 12), numbers(5), numbers(5, 12, seed=9)
    normed = x
    if isinstance(norm, RmsNorm):
        module = LlamaRMSNorm(12, 1e-5)
        module.weight = nn.Parameter(norm.weight)
        normed = module(x)
    elif norm is not None:
        normed = F.layer_norm(x, (12,), norm.weight, norm.bias, 1e-5)
    parts = [Projection(weight), Projection(weight, bias, "gelu_tanh"), Projection(weight, bias, "silu", gate, bias)]
    got = PLAIN.project(x, norm, [*parts, Projection(weight, None, "relu"), Projection(weight, None, "gelu")])
    plain = normed @ weight.T
    gated = F.silu(normed @ gate.T + bias) * (plain + bias)
    expected = [plain, F.gelu(plain + bias, approximate="tanh"), gated, plain.clamp(min=0), F.gelu(plain)]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=FLOAT32_STEP, atol=FLOAT32_STEP)


def test_advance_is_the_residual_every_linear_layer_and_what_is_read_of_it() -> None:
    residual, layers = numbers(2, 5), [nn.Linear(7, 5), nn.Linear(9, 5, bias=False)]
    xs = [numbers(2, 7), numbers(2, 9)]
    with torch.no_grad():
        expected = residual + sum(layer(x) for layer, x in zip(layers, xs, strict=True))
    terms = [
        Term(x, m.weight.detach(), None if m.bias is None else m.bias.detach()) for x, m in zip(xs, layers, strict=True)
    ]
    norm, parts = norm_of("layer", 5), [Projection(numbers(3, 5))]
    got, read = PLAIN.advance(residual, terms, norm, parts)
    torch.testing.assert_close(got, expected, rtol=FLOAT32_STEP, atol=FLOAT32_STEP)
    assert torch.equal(read[0], PLAIN.project(got, norm, parts)[0])
    assert PLAIN.advance(residual, terms, None, ())[1] == []


def test_results_are_rounded_once() -> None:
    x, weight = numbers(2, 64, dtype=torch.bfloat16), numbers(6, 64, dtype=torch.bfloat16)
    norm = norm_of("layer", 64, torch.bfloat16)
    exact = F.layer_norm(x.double(), (64,), norm.weight.double(), norm.bias.double(), 1e-5) @ weight.double().T
    assert torch.equal(PLAIN.project(x, norm, [Projection(weight)])[0], exact.to(torch.bfloat16))


class Attention:
    """One call's arguments: caches that hold 20 slots, a token at slot ``position``, rows that begin at 0 and 3."""

    def __init__(self, heads: int, groups: int, size: int, dtype: torch.dtype, position: int = 13, slots: int = 20):
        self.q, self.k, self.v = (numbers(2, n, size, dtype=dtype, seed=n) for n in (heads, groups, groups))
        self.k = self.k.flip(0)
        self.keys, self.values = (numbers(2, groups, slots, size, dtype=dtype, seed=s) for s in (5, 6))
        self.keys[:, :, position:] = self.values[:, :, position:] = torch.nan  # what no token wrote
        self.position = torch.tensor([position])
        self.first = torch.tensor([0, min(3, position)])
        self.scale = size**-0.5

    def rotary(self, rotated: int) -> tuple[Tensor, Tensor] | None:
        angles = numbers(2, rotated // 2, seed=8).repeat(1, 2)
        return (angles.cos().to(self.q.dtype), angles.sin().to(self.q.dtype)) if rotated else None

    def __call__(self, ops: StepOps, rotated: int = 0, window: int | None = None, cap: float | None = None) -> Tensor:
        new = (self.q, self.k, self.v, self.rotary(rotated), self.keys, self.values)
        return ops.attend(*new, self.position, self.first, self.scale, window, cap)


def by_torch(case: Attention, rotated: int, window: int | None) -> Tensor:
    """By transformers' rotation and torch's attention with a mask."""
    q, k, place = case.q, case.k, int(case.position)
    angles = case.rotary(rotated)
    if angles is not None:
        cos, sin = (a[:, None] for a in angles)
        turned = apply_rotary_pos_emb(q[..., None, :rotated], k[..., None, :rotated], cos, sin)
        q, k = (torch.cat([t[..., 0, :], o[..., rotated:]], -1) for t, o in zip(turned, (q, k), strict=True))
    keys, values = case.keys[:, :, : place + 1].clone(), case.values[:, :, : place + 1].clone()
    keys[:, :, -1], values[:, :, -1] = k, case.v
    repeat = q.shape[1] // k.shape[1]
    slot = torch.arange(place + 1, device=q.device)
    mask = slot >= case.first[:, None]
    if window is not None:
        mask = mask & (slot > place - window)
    keys, values = keys.repeat_interleave(repeat, 1), values.repeat_interleave(repeat, 1)
    return F.scaled_dot_product_attention(q[:, :, None], keys, values, mask[:, None, None]).flatten(1)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("rotated", [0, 4, 8])
@pytest.mark.parametrize("heads", [2, 4])
def test_attend_is_torchs_attention_over_real_slots(heads: int, rotated: int, window: int | None) -> None:
    case = Attention(heads, 2, 8, torch.float32)
    expected = by_torch(case, rotated, window)
    torch.testing.assert_close(case(PLAIN, rotated, window), expected, rtol=FLOAT32_STEP, atol=FLOAT32_STEP)
    assert torch.equal(case.values[:, :, 13], case.v)
    assert case.keys[:, :, 13].isfinite().all()
    assert case.keys[:, :, 14:].isnan().all()


def test_attend_without_a_new_key_takes_what_the_caches_hold() -> None:
    case = Attention(4, 2, 8, torch.float32)
    once = case(PLAIN, 4)
    rest = (case.rotary(4), case.keys, case.values, case.position, case.first, case.scale)
    assert torch.equal(PLAIN.attend(case.q, None, None, *rest), once)


def test_softcap_bounds_the_scores() -> None:
    case = Attention(2, 2, 8, torch.float32)
    case.scale = 1e6
    capped = case(PLAIN, cap=1e-6)  # all scores alike: the mean over the real slots
    real = case.values[1, :, 3:14].mean(1).flatten()
    torch.testing.assert_close(capped[1], real, rtol=FLOAT32_STEP, atol=FLOAT32_STEP)
    assert not torch.allclose(case(PLAIN)[1], real, atol=0.1)


def mixer_case(name: str, dtype: torch.dtype = torch.float32) -> tuple[Mamba2Mixer, MixerWeights, Tensor, Tensor]:
    """A mixer with random weights, the same as a step has them, and a window and state before it."""
    dims = MIXERS[name]
    with torch.device("cpu"):
        mixer = Mamba2Mixer(dims, 0)
        randomise(mixer, 0)
    mixer = mixer.to(torch.get_default_device(), dtype)
    conv = numbers(2, D_CONV - 1, 2 * dims.compact + dims.inner, dtype=dtype)
    return mixer, MixerWeights.of(mixer), conv, numbers(2, dims.heads, dims.head_dim, dims.head_dim)


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_mix_is_the_mixers_own_step(name: str) -> None:
    mixer, weights, conv, state = mixer_case(name)
    cache, tokens = DynamicCache(), numbers(2, 4, mixer.dims.hidden, seed=3)
    mixer(tokens[:, :1], past_key_values=cache)
    layer = recurrent_layer(cache, 0).read()
    assert layer is not None
    conv, state = layer.conv.clone(), layer.recurrent.clone()
    for t in range(1, 4):
        expected, _ = mixer(tokens[:, t : t + 1], past_key_values=cache)
        got = mixer.out_proj(PLAIN.mix(mixer.in_proj(tokens[:, t]), weights, conv, state))
        torch.testing.assert_close(got, expected[:, 0], rtol=FLOAT32_STEP, atol=FLOAT32_STEP)
    after = recurrent_layer(cache, 0).read()
    assert after is not None
    torch.testing.assert_close(state, after.recurrent, rtol=FLOAT32_STEP, atol=FLOAT32_STEP)
    assert torch.equal(conv, after.conv)


def test_bench_of_steps_runs_every_operation_and_chain_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    steps.main(["--small"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 16
    assert all(line.endswith("error 0.0e+00") for line in lines)


@pytest.fixture
def kernels() -> Iterator[StepOps]:
    """The kernels, and everything made on their device."""
    from pipeline.ops import step_kernels

    with torch.device(DEVICE):
        yield step_kernels.kernels()


def compare(got: Tensor, expected: Tensor, operations: int = 1) -> None:
    """Relative to the norm: rounding of single elements depends on the order of sums.

    Errors of operations in a row add up at most.
    """
    assert got.dtype == expected.dtype
    assert got.isfinite().all()
    error = float((got.double() - expected.double()).norm() / expected.double().norm())
    assert error <= operations * STEP_KERNEL[got.dtype], error


kernel = pytest.mark.skipif(WITHOUT_TRITON, reason=REASON)
SIZES = [(1, 80), (3, 80), (1, 300), (16, 48)]


def gpu(test: Any) -> Any:
    """A test of the kernels: ``gpu``, but under the interpreter runnable anywhere."""
    return kernel(test) if INTERPRETED else kernel(pytest.mark.gpu(test))


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_project_kernel_is_plain(kernels: StepOps, rows: int, size: int, name: str, dtype: torch.dtype) -> None:
    x, norm = 2 * numbers(rows, size, dtype=dtype) + 1, norm_of(name, size, dtype)
    weights = [numbers(n, size, dtype=dtype, seed=n) * size**-0.5 for n in (24, 37)]
    bias, gate_bias = numbers(37, dtype=dtype), numbers(37, dtype=dtype, seed=4)
    parts = [
        Projection(weights[0]),
        Projection(weights[1], bias, "gelu_tanh"),
        Projection(weights[1], bias, "silu", weights[1].flip(0).contiguous(), gate_bias),
        Projection(weights[0], None, "gelu"),
        Projection(weights[0], None, "relu", weights[0].flip(0).contiguous()),
    ]
    for got, expected in zip(kernels.project(x, norm, parts), PLAIN.project(x, norm, parts), strict=True):
        compare(got, expected)


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 5), (3, 1024), (2, 2500)])
def test_argmax_kernel_is_plain(kernels: StepOps, rows: int, size: int, dtype: torch.dtype) -> None:
    logits = numbers(rows, size, dtype=dtype)
    logits[0, size // 2] = logits[0, size - 1] = logits.max() + 1  # of equals the first
    logits[-1] -= 1e4
    got, expected = (torch.full((rows,), -1) for _ in range(2))
    kernels.argmax(logits, got)
    PLAIN.argmax(logits, expected)
    assert torch.equal(got, expected)
    assert got[0] == size // 2 or rows == 1
    logits[:] = torch.nan
    kernels.argmax(logits, got)
    assert ((got >= 0) & (got < size)).all()


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("rows", [1, 2, 16, 40])
def test_advance_kernel_is_plain(kernels: StepOps, rows: int, name: str, dtype: torch.dtype) -> None:
    residual, sizes, norm = numbers(rows, 37, dtype=dtype), (80, 1500), norm_of(name, 37, dtype)
    terms = [Term(numbers(rows, k, dtype=dtype), numbers(37, k, dtype=dtype) * k**-0.5) for k in sizes]
    terms[1] = replace(terms[1], bias=numbers(37, dtype=dtype))
    parts = [Projection(numbers(21, 37, dtype=dtype) * 37**-0.5, numbers(21, dtype=dtype), "silu")]
    for reads in (parts, []):
        got, expected = (ops.advance(residual, terms, norm, reads) for ops in (kernels, PLAIN))
        for one, other in zip((got[0], *got[1]), (expected[0], *expected[1]), strict=True):
            compare(one, other)


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("position", [0, 1, 40, 299])
@pytest.mark.parametrize(("heads", "groups", "size"), [(2, 2, 80), (4, 4, 16), (8, 2, 128), (3, 1, 20)])
@pytest.mark.parametrize(("window", "cap"), [(None, None), (17, None), (None, 2.0)])
def test_attend_kernel_is_plain_and_writes_the_same_caches(
    kernels: StepOps, heads: int, groups: int, size: int, window: int | None, cap: float | None, position: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    one, other = (Attention(heads, groups, size, dtype, position, 300) for _ in range(2))
    rotated = size // 4 * 2
    compare(one(kernels, rotated, window, cap), other(PLAIN, rotated, window, cap))
    torch.testing.assert_close(one.keys, other.keys, equal_nan=True)
    torch.testing.assert_close(one.values, other.values, equal_nan=True)
    rest = (one.rotary(rotated), one.keys, one.values, one.position, one.first, one.scale, window, cap)
    compare(kernels.attend(one.q, None, None, *rest), PLAIN.attend(one.q, None, None, *rest))


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("tile", ["MANY", "FEW", "SHORT"])
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 4, 80), (8, 2, 128)])
def test_attend_kernel_is_plain_by_every_tile(
    kernels: StepOps, heads: int, groups: int, size: int, tile: str, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from pipeline.ops import step_attention

    chosen = getattr(step_attention, tile)
    monkeypatch.setattr(step_attention, "_tile", lambda *_: chosen)
    one, other = (Attention(heads, groups, size, dtype, 299, 300) for _ in range(2))
    compare(one(kernels, size // 4 * 2), other(PLAIN, size // 4 * 2))


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_mix_kernel_is_plain_and_keeps_the_same_state(kernels: StepOps, name: str, dtype: torch.dtype) -> None:
    mixer, weights, conv, state = mixer_case(name, dtype)
    conv_plain, state_plain = conv.clone(), state.clone()
    for t in range(3):
        projected = numbers(2, mixer.dims.width, dtype=dtype, seed=t)
        compare(kernels.mix(projected, weights, conv, state), PLAIN.mix(projected, weights, conv_plain, state_plain))
    assert torch.equal(conv, conv_plain)
    compare(state, state_plain)


@pytest.mark.gpu
@pytest.mark.skipif(WITHOUT_TRITON or INTERPRETED, reason="needs a CUDA device and Triton")
@torch.no_grad()
def test_captured_chain_goes_on_at_each_replay_from_the_position_on_the_device(kernels: StepOps) -> None:
    """A layer with attention and one with a mixer in one graph: every replay is a plain step of its own."""
    dtype, size, steps_ = torch.bfloat16, 2 * 16, range(5, 12)
    weights = [numbers(size, size, dtype=dtype, seed=s) * size**-0.5 for s in range(5)]
    mixer, inside, conv, state = mixer_case("grouped", dtype)
    case, other = (Attention(2, 2, 16, dtype, 5, 40) for _ in range(2))
    mine, truth = (conv, state), (conv.clone(), state.clone())
    norm, tokens = norm_of("layer", size, dtype), [numbers(2, size, dtype=dtype, seed=s) for s in steps_]
    entered, angles = tokens[0].clone(), case.rotary(8)

    def step(ops: StepOps, x: Tensor, held: Attention, states: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (t.view(2, 2, 16) for t in ops.project(x, norm, [Projection(w) for w in weights[:3]]))
        ends = (held.position, held.first, held.scale, None, None)
        mixed = Term(ops.attend(q, k, v, angles, held.keys, held.values, *ends), weights[3])
        x, (projected,) = ops.advance(x, [mixed], norm, [Projection(mixer.in_proj.weight)])
        return ops.advance(x, [Term(ops.mix(projected, inside, *states), weights[4])], None, ())[0]

    saved = [t.clone() for t in mine]
    step(kernels, entered, case, mine)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(kernels, entered, case, mine)
    for tensor, value in zip(mine, saved, strict=True):
        tensor.copy_(value)
    for position, token in zip(steps_, tokens, strict=True):
        entered.copy_(token)
        case.position.fill_(position)
        other.position.fill_(position)
        graph.replay()
        compare(out, step(PLAIN, token, other, truth), operations=5)
