"""How a mixer starts: ``matvlm`` as the reference does, ``mimic`` near linear attention, ``random`` as stock Mamba-2.

Sources: Mamba-2's own initialisation (Dao & Gu 2024), MaTVLM's weight transfer (arXiv 2503.13440: Q→C, K→B, V→x,
O→out_proj), and the linear-attention start used by MOHAWK and mmMamba.
"""

import math

import torch
from torch import Tensor, nn

from pipeline.mixer import D_CONV, Mamba2Mixer
from pipeline.surgery import attention_projections, qk_gains
from schemas.sections import Init

# Mamba-2's ranges for the step size and the decay rate.
DT_MIN, DT_MAX, DT_FLOOR, A_MAX = 1e-3, 0.1, 1e-4, 16.0
# silu(1.278) = 1: the gate lets everything through.
OPEN_GATE = 1.278
# How many tokens' values an attention output averages, roughly: a mean of n unrelated vectors is √n shorter than they.
AVERAGED = 16
# Memory lengths of the heads under `mimic`, tokens: from a phrase to longer than most prompts.
SHORTEST_MEMORY, LONGEST_MEMORY = 16.0, 4096.0


@torch.no_grad()
def initialise(mixer: Mamba2Mixer, attention: nn.Module, init: Init, generator: torch.Generator) -> None:
    """Sets every parameter of the mixer; ``generator`` (on the CPU) makes the random parts reproducible."""
    _stock(mixer, generator)
    if init == "random":
        return
    q, k, v, o = attention_projections(attention)
    rows = mixer.dims.rows
    for block, source in (("x", v), ("B", k), ("C", q)):
        mixer.in_proj.weight[rows[block]] = source.weight
    mixer.out_proj.weight.copy_(o.weight)
    scale = float(getattr(attention, "scaling", mixer.dims.head_dim**-0.5))
    if mixer.c_norm is not None and mixer.b_norm is not None:
        gains = qk_gains(attention, mixer.dims.head_dim)
        assert gains is not None
        # a norm takes away what the rows of C are multiplied by, so the attention's scale goes after it
        mixer.c_norm.weight.copy_(gains[0] * (scale if init == "mimic" else 1.0))
        mixer.b_norm.weight.copy_(gains[1])
    if init == "mimic":
        _mimic(mixer, (q, k, v, o), scale if mixer.c_norm is None else 1.0)


def _stock(mixer: Mamba2Mixer, generator: torch.Generator) -> None:
    dims = mixer.dims

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.empty(like.shape).uniform_(low, high, generator=generator).to(like)

    for linear in (mixer.in_proj, mixer.out_proj):
        bound = 1 / math.sqrt(linear.in_features)
        linear.weight.copy_(uniform(linear.weight, -bound, bound))
        if linear.bias is not None:
            linear.bias.copy_(uniform(linear.bias, -bound, bound))
    bound = 1 / math.sqrt(D_CONV)
    assert mixer.conv1d.bias is not None
    mixer.conv1d.weight.copy_(uniform(mixer.conv1d.weight, -bound, bound))
    mixer.conv1d.bias.copy_(uniform(mixer.conv1d.bias, -bound, bound))
    dt = uniform(mixer.dt_bias, math.log(DT_MIN), math.log(DT_MAX)).exp().clamp(min=DT_FLOOR)
    mixer.dt_bias.copy_(inverse_softplus(dt))
    mixer.A_log.copy_(uniform(mixer.A_log, 1.0, A_MAX).log())
    mixer.D.fill_(1.0)
    mixer.norm.weight.fill_(1.0)
    assert mixer.norm.weight.shape == (dims.inner,)


def inverse_softplus(value: Tensor) -> Tensor:
    """X with ``softplus(x) = value``."""
    return value + torch.log(-torch.expm1(-value))


def _mimic(mixer: Mamba2Mixer, projections: tuple[nn.Linear, ...], scale: float) -> None:
    """Identity convolution that also holds the projections' biases, constant step 1, slow decay, open gate."""
    (q, k, v, o), dims, rows = projections, mixer.dims, mixer.dims.rows
    mixer.in_proj.weight[rows["C"]] *= scale
    mixer.in_proj.weight[rows["z"]] = 0
    mixer.in_proj.weight[rows["dt"]] = 0
    mixer.conv1d.weight.zero_()
    mixer.conv1d.weight[:, 0, -1] = 1
    assert mixer.conv1d.bias is not None
    biases = [torch.zeros(p.out_features) if p.bias is None else p.bias.float().cpu() for p in (v, k, q)]
    mixer.conv1d.bias.copy_(torch.cat([biases[0], biases[1], biases[2] * scale]))
    mixer.dt_bias.copy_(inverse_softplus(torch.ones(dims.heads)))
    memory = torch.logspace(math.log10(SHORTEST_MEMORY), math.log10(LONGEST_MEMORY), dims.heads)
    mixer.A_log.copy_((1 / memory).log())
    mixer.D.zero_()
    if mixer.in_proj.bias is not None:
        mixer.in_proj.bias.zero_()
        mixer.in_proj.bias[rows["z"]] = OPEN_GATE
        mixer.out_proj.bias.copy_(torch.zeros_like(mixer.out_proj.bias) if o.bias is None else o.bias)
    # The size of a mean of values, for inputs of unit size; taps, where there are any, give the true gain.
    mixer.norm.weight.fill_(float((v.weight.float().square().sum(1).mean() / AVERAGED).sqrt()))


@torch.no_grad()
def match_gain(mixer: Mamba2Mixer, taps: list[tuple[Tensor, Tensor]]) -> None:
    """Sets the norm weight, one number a head, to the least-squares fit of the attention outputs.

    ``taps`` holds pairs of the layer's input and attention output, each [L, D]. With unit weight the mixer's output is
    a sum over heads; the weights solve ``min_w || sum_h w_h f_h - (a - bias) ||²``.
    """
    heads, width = mixer.dims.heads, mixer.dims.head_dim
    mixer.norm.weight.fill_(1.0)
    out_DHP = mixer.out_proj.weight.float().unflatten(1, (heads, width))
    bias = 0.0 if mixer.out_proj.bias is None else mixer.out_proj.bias.float()
    gram = torch.zeros(heads, heads, dtype=torch.float64)
    moment = torch.zeros(heads, dtype=torch.float64)
    for u_LD, a_LD in taps:
        normed = mixer.normed(u_LD[None])[0].float().unflatten(1, (heads, width))
        parts_HLD = torch.einsum("lhp,dhp->hld", normed, out_DHP)
        gram += torch.einsum("hld,gld->hg", parts_HLD, parts_HLD).double().cpu()
        moment += torch.einsum("hld,ld->h", parts_HLD, a_LD.float() - bias).double().cpu()
    ridge = 1e-6 * gram.diagonal().mean()  # heads that say the same must not blow up against each other
    gain = torch.linalg.solve(gram + ridge * torch.eye(heads, dtype=torch.float64), moment)
    mixer.norm.weight.copy_(gain.repeat_interleave(width).to(mixer.norm.weight))
