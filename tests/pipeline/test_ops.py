import pytest
import torch
from torch import Tensor

from pipeline.ops import reference
from tests.tolerances import FLOAT64


def naive_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written."""
    batch, length, heads, width = x.shape
    state = x.new_zeros(batch, heads, width, b.shape[-1])
    out = []
    for t in range(length):
        decay = (dt[:, t] * a).exp()[..., None, None]
        state = state * decay + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None, :]
        out.append((state * c[:, t, :, None, :]).sum(-1) + d[:, None] * x[:, t])
    return torch.stack(out, 1), state


@pytest.fixture
def _float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations compute in float32 by design; for exactness the tests lift that to float64."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)


def scan_inputs(length: int, width: int = 3, state: int = 5) -> list[Tensor]:
    torch.manual_seed(length)
    double = torch.float64
    shapes = [(2, length, 2, width), (2, length, 2), (2,), (2, length, 2, state), (2, length, 2, state), (2,)]
    x, dt, a, b, c, d = (torch.randn(s, dtype=double) for s in shapes)
    return [t.requires_grad_() for t in (x, dt.exp(), -a.exp(), b, c, d)]


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(("length", "chunk"), [(1, 4), (4, 4), (13, 4), (13, 64), (32, 8)])
def test_chunked_scan_is_the_recurrence_in_outputs_states_and_gradients(length: int, chunk: int) -> None:
    inputs = scan_inputs(length)
    weights = torch.randn(2, length, 2, 3, dtype=torch.float64), torch.randn(2, 2, 3, 5, dtype=torch.float64)
    found = []
    for scan in (naive_scan, lambda *a: reference.ssd_scan(*a, chunk=chunk)):
        y, state = scan(*inputs)
        loss = (y * weights[0]).sum() + (state * weights[1]).sum()
        found.append((y, state, *torch.autograd.grad(loss, inputs)))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.usefixtures("_float64")
def test_steps_one_by_one_are_the_scan() -> None:
    x, dt, a, b, c, d = (t.detach() for t in scan_inputs(9))
    y, final = reference.ssd_scan(x, dt, a, b, c, d)
    state = torch.zeros_like(final)
    for t in range(9):
        step, state = reference.ssd_step(state, x[:, t], dt[:, t], a, b[:, t], c[:, t], d)
        torch.testing.assert_close(step, y[:, t], rtol=FLOAT64, atol=FLOAT64)
    torch.testing.assert_close(state, final, rtol=FLOAT64, atol=FLOAT64)


def test_causal_convolution_is_torchs_conv1d_and_its_steps() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 7, 6), torch.randn(6, 4), torch.randn(6)
    out = reference.causal_conv(x, weight, bias)
    padded = torch.nn.functional.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=3, groups=6)
    torch.testing.assert_close(out, torch.nn.functional.silu(padded[..., :7]).transpose(1, 2))
    window = torch.nn.functional.pad(x.transpose(1, 2), (3, 0))
    for t in range(7):
        torch.testing.assert_close(reference.conv_step(window[..., t : t + 4], weight, bias), out[:, t])


def test_gated_norm_divides_each_head_by_its_own_root_mean_square() -> None:
    torch.manual_seed(0)
    y, z, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    gated = y * torch.nn.functional.silu(z)
    expected = torch.cat(
        [part / (part.square().mean(-1, keepdim=True) + 1e-5).sqrt() for part in gated.split(4, -1)], -1
    )
    torch.testing.assert_close(reference.gated_rms_norm(y, z, weight, 2, 1e-5), expected * weight)
