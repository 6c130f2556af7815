"""The mamba-ssm backend against the reference, on a CUDA device; and how a backend is chosen, anywhere."""

import copy
import importlib
import logging
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.mixer import Mamba2Mixer
from pipeline.ops import reference
from pipeline.ops.backends import resolve
from pipeline.ops.opset import TORCH, OpSet
from schemas.errors import BackendUnavailable
from schemas.hybrid import MixerDims
from tests.decoders import FAMILIES, build, hybrid, randomise, tokens
from tests.pipeline.test_ops import gradients, packed, scan_inputs
from tests.tolerances import KERNEL_OVER_TORCH, KERNEL_RELATIVE, STOCK_MAMBA2

DTYPES = [torch.float32, torch.bfloat16]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def missing(name: str) -> Any:
    raise ImportError(f"No module named {name!r}")


def test_backend_that_is_not_installed_is_an_error_with_cause_and_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(BackendUnavailable, match=r"No module named 'mamba_ssm.*pip install --no-build-isolation"):
        resolve("mamba-ssm", CUDA)


def test_backend_that_cannot_run_on_the_device_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda _: object())
    with pytest.raises(BackendUnavailable, match="needs a CUDA device, this is cpu"):
        resolve("mamba-ssm", CPU)


def test_auto_says_why_it_takes_torch(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with caplog.at_level(logging.INFO, "decant"):
        assert resolve("auto", CPU).scan is TORCH.scan
        assert "operations: torch (auto: the kernels need a CUDA device, this is cpu)" in caplog.text
        monkeypatch.setattr(importlib, "import_module", missing)
        assert resolve("auto", CUDA).scan is TORCH.scan
    assert re.search("operations: torch .*No module named 'mamba_ssm.*pip install", caplog.text)


@pytest.fixture(scope="module")
def kernels() -> OpSet:
    return resolve("mamba-ssm", CUDA)


def relative(got: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def assert_near(
    names: list[str], got: list[Tensor], expected: list[Tensor], dtype: torch.dtype, plain: list[Tensor] | None = None
) -> None:
    """Each within the table's bound of the float64 values, or nearly as near as plain torch in the same type is."""
    errors = {n: relative(g, e) for n, g, e in zip(names, got, expected, strict=True)}
    allowed = dict.fromkeys(names, KERNEL_RELATIVE[dtype])
    for n, p, e in zip(names, plain or [], expected, strict=False):
        allowed[n] = max(allowed[n], KERNEL_OVER_TORCH * relative(p, e))
    print({n: f"{e:.1e} of {allowed[n]:.1e}" for n, e in errors.items()})
    assert all(torch.isfinite(g).all() for g in got)
    assert not {n: (e, allowed[n]) for n, e in errors.items() if e > allowed[n]}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 80, 128])
@pytest.mark.parametrize("length", [1, 3, 65, 257, 1000])
@pytest.mark.parametrize("extra", ["none", "state", "resets", "state and resets"])
def test_scan_kernel_is_the_reference_in_outputs_and_gradients(
    kernels: OpSet, length: int, width: int, dtype: torch.dtype, extra: str
) -> None:
    x, dt, a, b, c, *rest = scan_inputs(length, with_state="state" in extra, width=width, size=width)
    # what is a product of `width` terms has their size; without this the backward sums cancel to noise
    wide = [t.to(CUDA, dtype) for t in (x, b * width**-0.5, c)]
    inputs = [wide[0], *(t.to(CUDA, torch.float32) for t in (dt, a)), wide[1], wide[2]]
    inputs += [t.to(CUDA, torch.float32) for t in rest]
    seq_idx = packed(length).to(CUDA) if "resets" in extra else None
    expected = gradients(reference.ssd_scan, [t.double() for t in inputs], seq_idx)
    got = gradients(kernels.scan, inputs, seq_idx)
    names = ["y", "state", "dx", "ddt", "dA", "dB", "dC", "dD", "dstate"][: len(got)]
    assert_near(names, got, expected, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [16, 240, 22])
@pytest.mark.parametrize("length", [1, 2, 3, 65, 1000])
@pytest.mark.parametrize("extra", ["none", "state", "resets"])
def test_convolution_kernel_is_the_reference_in_outputs_and_gradients(
    kernels: OpSet, length: int, channels: int, dtype: torch.dtype, extra: str
) -> None:
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, length, channels), (channels, 4), (channels,), *([(2, 3, channels)] if extra == "state" else [])]
    inputs = [torch.randn(s, generator=generator).to(CUDA, dtype) for s in shapes]
    seq_idx = packed(length).to(CUDA) if extra == "resets" else None

    def run(conv: Any, tensors: list[Tensor]) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        # as the mixer has it: a slice of wider rows, whose strides are not multiples of eight
        rows = torch.cat([leaves[0], leaves[0][..., :3]], -1)[..., :channels]
        out, window = conv(rows, leaves[1], leaves[2], leaves[3] if len(leaves) == 4 else None, seq_idx)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        return [out.detach(), window.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]

    expected = run(reference.causal_conv, [t.double() for t in inputs])
    got = run(kernels.conv, inputs)
    assert_near(["y", "window", "dx", "dweight", "dbias", "dstate"][: len(got)], got, expected, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 80, 128])
@torch.no_grad()
def test_step_kernel_is_the_reference_and_leaves_the_old_state_alone(
    kernels: OpSet, width: int, dtype: torch.dtype
) -> None:
    x, dt, a, b, c, d, state = scan_inputs(1, with_state=True, width=width, size=width)
    wide = [t[:, 0].to(CUDA, dtype) for t in (x, b, c)]
    dt, a, d, state = (t.to(CUDA, torch.float32) for t in (dt[:, 0], a, d, state))
    kept = state.clone()
    got = kernels.step(state, wide[0], dt, a, wide[1], wide[2], d)
    exact = [t.double() for t in (state, wide[0], dt, a, wide[1], wide[2], d)]
    assert_near(["y", "state"], list(got), list(reference.ssd_step(*exact)), dtype)
    assert torch.equal(state, kept)


MIXERS = {
    "phi": MixerDims(hidden=160, heads=2, kv_heads=2, head_dim=80, bias=True),
    "64": MixerDims(hidden=128, heads=8, kv_heads=8, head_dim=64, bias=False),
    "grouped": MixerDims(hidden=256, heads=4, kv_heads=2, head_dim=128, bias=True),
    "normed": MixerDims(hidden=256, heads=4, kv_heads=4, head_dim=64, bias=False, qk_norm=True),
    "odd rows": MixerDims(hidden=128, heads=3, kv_heads=3, head_dim=40, bias=True),
}


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["plain", "padded", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MIXERS)
def test_mixer_on_kernels_is_the_mixer_in_float64(kernels: OpSet, name: str, dtype: torch.dtype, mode: str) -> None:
    dims, length = MIXERS[name], 100
    mixer = Mamba2Mixer(dims, 0)
    randomise(mixer, 0)
    with torch.no_grad():
        mixer.in_proj.weight.mul_(0.3)
        # slow decays: where D x outweighs the state, the norm takes out what D and dt change, and leaves rounding
        mixer.A_log.sub_(3.0)
        mixer.dt_bias.sub_(1.0)
    mixer = mixer.to(CUDA, dtype)
    plain, exact = copy.deepcopy(mixer), copy.deepcopy(mixer).double()
    mixer.use(kernels)
    torch.manual_seed(0)
    u = torch.randn(2, length, dims.hidden).to(CUDA, dtype)
    positions = torch.arange(length, device=CUDA)
    mask = (positions >= torch.tensor([[30], [0]], device=CUDA)).long() if mode == "padded" else None
    seq_idx = packed(length).to(CUDA) if mode == "packed" else None
    found = []
    for module, value in ((mixer, u), (exact, u.double()), (plain, u)):
        leaf = value.clone().requires_grad_()
        out, _ = module(leaf, padding_mask=mask, seq_idx=seq_idx)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        if mask is not None:
            weight = weight * mask[..., None]
            out = out * mask[..., None]
        grads = torch.autograd.grad((out * weight).sum(), [leaf, *module.parameters()])
        found.append([out.detach(), *grads])
    names = ["y", "du", *(n for n, _ in mixer.named_parameters())]
    assert_near(names, found[0], found[1], dtype, found[2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixer_is_stock_mamba2_with_the_same_state_dict(kernels: OpSet, dtype: torch.dtype) -> None:
    stock = importlib.import_module("mamba_ssm.modules.mamba2")
    dims = MixerDims(hidden=320, heads=4, kv_heads=4, head_dim=80, bias=False)
    ours = Mamba2Mixer(dims, 0)
    randomise(ours, 0)
    theirs = stock.Mamba2(320, d_state=80, headdim=80, ngroups=4, expand=1)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours, theirs = ours.to(CUDA, dtype), theirs.to(CUDA, dtype)
    for name in ("A_log", "D", "dt_bias"):
        getattr(theirs, name).data = getattr(ours, name).data
    torch.manual_seed(0)
    u = torch.randn(2, 300, 320).to(CUDA, dtype)
    for ops in (kernels, TORCH):
        ours.use(ops)
        with torch.no_grad():
            error = relative(ours(u)[0], theirs(u))
        print(f"{ops.backend}: {error:.1e}")
        assert error <= STOCK_MAMBA2[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("replaced", [(0, 2), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_kernels_generate_the_cpus_tokens_in_float32(kernels: OpSet, family: str, replaced: tuple[int, ...]) -> None:
    ids = torch.stack(tokens(37, 37))
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cpu = hybrid(build(family), replaced, "matvlm")
    gpu = hybrid(build(family), replaced, "matvlm", ops=kernels).to(CUDA)
    expected = cpu.generate(input_ids=ids, **settings)
    assert gpu.generate(input_ids=ids.to(CUDA), **settings).tolist() == expected.tolist()


@pytest.mark.gpu
@torch.no_grad()
def test_phi2_mixer_takes_more_than_two_to_the_31_elements(kernels: OpSet) -> None:
    """64 × 4,096 × 10,272: the kernels' 32-bit indices end at 2^31; the batch is split."""
    torch.manual_seed(0)
    with CUDA:
        mixer = Mamba2Mixer(MixerDims(hidden=2560, heads=32, kv_heads=32, head_dim=80, bias=False), 0)
        mixer.to(torch.bfloat16).use(kernels)
        u = torch.randn(64, 4096, 2560, dtype=torch.bfloat16)
    assert u.shape[0] * u.shape[1] * mixer.dims.width > 2**31
    out = mixer(u)[0]
    for row in (0, 31, 32, 63):
        assert relative(out[row : row + 1], mixer(u[row : row + 1])[0]) <= KERNEL_RELATIVE[torch.bfloat16]
