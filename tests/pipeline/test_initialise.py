import math

import pytest
import torch
import torch.nn.functional as F

from pipeline.initialise import initialise, inverse_softplus, match_gain
from pipeline.mixer import Mamba2Mixer
from pipeline.surgery import attention_projections, mixer_dims
from tests.conftest import tiny_model


def start(init: str) -> tuple[Mamba2Mixer, torch.nn.Module]:
    attention = tiny_model().model.language_model.layers[0].self_attn
    mixer = Mamba2Mixer(mixer_dims(attention, bias=init == "mimic"), 0)
    initialise(mixer, attention, init, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    return mixer, attention


@pytest.mark.parametrize("init", ["matvlm", "mimic"])
def test_mixer_starts_from_the_attention_weights(init: str) -> None:
    mixer, attention = start(init)
    q, k, v, o = attention_projections(attention)
    rows, scale = mixer.dims.rows, 0.25 if init == "mimic" else 1.0
    assert torch.equal(mixer.in_proj.weight[rows["x"]], v.weight)
    assert torch.equal(mixer.in_proj.weight[rows["B"]], k.weight)
    torch.testing.assert_close(mixer.in_proj.weight[rows["C"]], q.weight * scale)
    assert torch.equal(mixer.out_proj.weight, o.weight)


def test_stock_ranges_of_the_random_parts() -> None:
    mixer, _ = start("random")
    dt = F.softplus(mixer.dt_bias)
    assert (dt >= 1e-3 * 0.99).all()
    assert (dt <= 0.1 * 1.01).all()
    assert (mixer.A_log.exp() >= 1).all()
    assert (mixer.A_log.exp() <= 16).all()
    assert mixer.conv1d.weight.abs().max() <= 0.5
    assert mixer.in_proj.weight.abs().max() <= 1 / math.sqrt(32)


def test_mimic_is_decayed_linear_attention_on_silu_of_the_teachers_projections() -> None:
    mixer, attention = start("mimic")
    q, k, v, o = attention_projections(attention)
    torch.manual_seed(1)
    u = torch.randn(1, 7, 32)
    heads, width = 2, 16
    scale = 1 / math.sqrt(width)
    qs, ks, vs = (F.silu(p).unflatten(-1, (heads, width))[0] for p in (q(u) * scale, k(u), v(u)))
    rate = mixer.A_log.exp()
    out = torch.zeros(7, heads, width)
    for t in range(7):
        for s in range(t + 1):
            weight = (qs[t] * ks[s]).sum(-1) * torch.exp(-rate * (t - s))
            out[t] += weight[:, None] * vs[s]
    normed = out / (out.square().mean(-1, keepdim=True) + mixer.dims.eps).sqrt() * mixer.norm.weight.view(heads, width)
    # the gate's constant is given to four digits, and the norm removes it but for eps
    torch.testing.assert_close(mixer(u)[0], o(normed.flatten(-2))[None], rtol=1e-3, atol=1e-3)


def test_gain_is_the_least_squares_fit() -> None:
    mixer, _ = start("mimic")
    torch.manual_seed(2)
    taps = [(torch.randn(9, 32), torch.randn(9, 32)) for _ in range(5)]

    def error() -> float:
        with torch.no_grad():
            return float(sum((mixer(u[None])[0][0] - a).square().sum() for u, a in taps))

    match_gain(mixer, taps)
    best, weight = error(), mixer.norm.weight.detach().clone()
    for head in range(2):
        for change in (-0.01, 0.01):
            with torch.no_grad():
                mixer.norm.weight.copy_(weight)
                mixer.norm.weight[head * 16 : (head + 1) * 16] += change
            assert error() > best


def test_inverse_softplus_inverts() -> None:
    values = torch.tensor([1e-4, 0.1, 1.0, 20.0])
    torch.testing.assert_close(F.softplus(inverse_softplus(values)), values)
