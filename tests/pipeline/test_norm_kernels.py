"""The gated norm's kernels mean what ``reference.gated_rms_norm`` does, gradients included.

On CUDA devices, and anywhere under Triton's interpreter: ``TRITON_INTERPRET=1``.
"""

import importlib.util
import os

import pytest
import torch
from torch import Tensor

from pipeline.ops import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
WITHOUT_TRITON = importlib.util.find_spec("triton") is None or not (INTERPRETED or torch.cuda.is_available())
EPS = 1e-5
# Sums of 80 products in float32 in another order; bfloat16 rounds the results to 8 bits.
NEAR = {torch.float32: 2e-6, torch.bfloat16: 4e-3}

pytestmark = pytest.mark.skipif(WITHOUT_TRITON, reason="needs a CUDA device, or Triton and TRITON_INTERPRET=1")
if not INTERPRETED:
    pytestmark = [pytestmark, pytest.mark.gpu]


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else list(NEAR))
@pytest.mark.parametrize(("heads", "size", "tokens"), [(2, 80, 5), (3, 64, 33), (1, 128, 17)])
@pytest.mark.parametrize("sliced", [False, True])
def test_output_and_gradients_are_the_references(
    dtype: torch.dtype, heads: int, size: int, tokens: int, sliced: bool
) -> None:
    from pipeline.ops.norm_kernels import gated_rms_norm

    torch.manual_seed(0)
    inner = heads * size
    y = torch.randn(2, tokens, inner, dtype=dtype, device=DEVICE)
    projected = torch.randn(2, tokens, inner + 24, dtype=dtype, device=DEVICE)
    weight, back = torch.randn(inner, device=DEVICE), torch.randn(2, tokens, inner, dtype=dtype, device=DEVICE)
    found = []
    for norm in (gated_rms_norm, reference.gated_rms_norm):
        leaves = [t.clone().requires_grad_() for t in (y, projected, weight)]
        z = leaves[1][..., :inner] if sliced else leaves[1][..., :inner].contiguous()
        out = norm(leaves[0], z, leaves[2], heads, EPS)
        out.backward(back)
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*found, strict=True):
        assert got.dtype == expected.dtype
        assert relative(got, expected) < NEAR[dtype]
