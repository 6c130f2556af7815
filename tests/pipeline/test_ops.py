import pytest
import torch
from torch import Tensor

from pipeline.ops import reference
from tests.tolerances import FLOAT32_SCAN, FLOAT64

# Around one chunk's end (64), and beyond the default chunk of 128.
LENGTHS = (1, 2, 63, 64, 65, 257, 1000)


def naive_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written."""
    batch, length, heads, width = x.shape
    if state is None:
        state = x.new_zeros(batch, heads, width, b.shape[-1])
    out = []
    for t in range(length):
        if seq_idx is not None and t:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        decay = (dt[:, t] * a).exp()[..., None, None]
        state = state * decay + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None, :]
        out.append((state * c[:, t, :, None, :]).sum(-1) + d[:, None] * x[:, t])
    return torch.stack(out, 1), state


def scan_inputs(length: int, *, with_state: bool, width: int = 3, size: int = 5) -> list[Tensor]:
    """x, dt, A, B, C, D and perhaps a state, in float64; decays from a token to thousands as in trained models."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, b, c = normal(2, length, 2, width), normal(2, length, 2, size), normal(2, length, 2, size)
    dt, a = torch.nn.functional.softplus(normal(2, length, 2) - 2), -normal(2).exp()
    state = [normal(2, 2, width, size)] if with_state else []
    return [x, dt, a, b, c, normal(2), *state]


def packed(length: int) -> Tensor:
    """Sequence numbers of two rows with breaks at other places; one row's falls on a chunk's end."""
    positions = torch.arange(length)
    return torch.stack([(positions >= 64).long() + (positions >= 70), (positions >= length // 3).long() * 3])


def gradients(scan: object, inputs: list[Tensor], seq_idx: Tensor | None) -> list[Tensor]:
    """Output, final state and the gradients of everything, under fixed weights."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    padded = leaves if len(leaves) == 7 else [*leaves, None]
    y, state = scan(*padded, seq_idx)  # type: ignore[operator]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (y, state)]
    loss = (y * weights[0]).sum() + (state * weights[1]).sum()
    return [y.detach(), state.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_scan_is_the_recurrence_in_outputs_states_and_gradients(length: int, with_state: bool, resets: bool) -> None:
    inputs = scan_inputs(length, with_state=with_state)
    seq_idx = packed(length) if resets else None
    expected = gradients(naive_scan, inputs, seq_idx)
    names = ["y", "state", "dx", "ddt", "dA", "dB", "dC", "dD", "dstate"]
    for dtype, bound in ((torch.float64, FLOAT64), (torch.float32, FLOAT32_SCAN)):
        got = gradients(reference.ssd_scan, [t.to(dtype) for t in inputs], seq_idx)
        for name, right, found in zip(names, expected, got, strict=False):
            scale = right.norm().clamp(min=1e-300)
            assert (found.double() - right).norm() / scale <= bound, (name, dtype)


@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
def test_scan_does_not_depend_on_the_chunk(chunk: int) -> None:
    inputs, seq_idx = scan_inputs(70, with_state=True), packed(70)
    one, other = (reference.ssd_scan(*inputs, seq_idx, chunk=c) for c in (chunk, 128))  # type: ignore[misc]
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=FLOAT64, atol=FLOAT64)


def test_steps_one_by_one_are_the_scan() -> None:
    x, dt, a, b, c, d, state = scan_inputs(9, with_state=True)
    y, final = reference.ssd_scan(x, dt, a, b, c, d, state)
    for t in range(9):
        step, state = reference.ssd_step(state, x[:, t], dt[:, t], a, b[:, t], c[:, t], d)
        torch.testing.assert_close(step, y[:, t], rtol=FLOAT64, atol=FLOAT64)
    torch.testing.assert_close(state, final, rtol=FLOAT64, atol=FLOAT64)


def test_causal_convolution_is_torchs_conv1d() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 7, 6), torch.randn(6, 4), torch.randn(6)
    out, window = reference.causal_conv(x, weight, bias)
    padded = torch.nn.functional.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=3, groups=6)
    torch.testing.assert_close(out, torch.nn.functional.silu(padded[..., :7]).transpose(1, 2))
    assert torch.equal(window, x[:, -3:])


@pytest.mark.parametrize("cuts", [(1, 2, 3, 4, 5, 6), (2,), (5,)])
def test_convolution_in_pieces_is_the_convolution(cuts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 7, 6), torch.randn(6, 4), torch.randn(6)
    whole, window = reference.causal_conv(x, weight, bias)
    state, parts = None, []
    for piece in x.tensor_split(cuts, 1):
        out, state = reference.causal_conv(piece, weight, bias, state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert state is not None
    assert torch.equal(state, window)


def test_convolution_starts_anew_at_each_packed_sequence() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 9, 6), torch.randn(6, 4), torch.randn(6)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 3, 3]])
    out, _ = reference.causal_conv(x, weight, bias, None, seq_idx)
    alone = [reference.causal_conv(part, weight, bias)[0] for part in x.split([2, 4, 1, 2], 1)]
    torch.testing.assert_close(out, torch.cat(alone, 1))


def test_gated_norm_divides_each_head_by_its_own_root_mean_square() -> None:
    torch.manual_seed(0)
    y, z, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    gated = y * torch.nn.functional.silu(z)
    expected = torch.cat(
        [part / (part.square().mean(-1, keepdim=True) + 1e-5).sqrt() for part in gated.split(4, -1)], -1
    )
    torch.testing.assert_close(reference.gated_rms_norm(y, z, weight, 2, 1e-5), expected * weight)
