"""What the Triton kernels of a decoding step share on the device: the hand-over between kernels, and elementwise maths.

Programmatic dependent launch: a kernel's programs start while the kernel before is still running. Each lets its own
successor start at once (``release``), loads what no kernel writes (weights), and then waits (``wait``) until the kernel
before is finished and its writes are visible. Since every program waits before it writes or ends, a finished kernel
means that all before it are finished too, so memory may be reused as if kernels ran one by one.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def release(PDL: tl.constexpr):
    """Lets the next kernel's programs start where this one's leave room."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Returns when the kernel before is finished; nothing that a kernel wrote may be touched earlier."""
    if PDL:
        gdc_wait()


@triton.jit
def tanh(x):
    """Without the device library, which Triton's interpreter lacks; by its series where the quotient is near 1."""
    square = x * x
    series = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(square < 0.01, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def silu(x):
    """``x · sigmoid(x)``."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    """``log(1 + exp(x))``; by its series where the sum would round to 1, and x itself above 20 as torch has it."""
    e = tl.exp(tl.minimum(x, 20.0))
    small = e * (1.0 - e * (0.5 - e * (1.0 / 3.0)))
    return tl.where(x > 20.0, x, tl.where(e < 0.01, small, tl.log(1.0 + e)))


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """The activation that stepping.py names; None leaves x as it is."""
    if ACTIVATION == "gelu_tanh":
        x = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == "silu":
        x = silu(x)
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    return x
