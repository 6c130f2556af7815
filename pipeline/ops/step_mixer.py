"""``mix`` of a decoding step in Triton: one program a sequence and head, all arithmetic in float32.

A program reads its head's state once and writes it once, which is nearly all that moves. Its convolution needs three
short windows, of x, B and C; where heads share x and B, one head's program must not move a window that another's still
reads, so a second, small kernel moves all of them afterwards.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from pipeline.ops.step_device import release, silu, softplus, wait
from pipeline.ops.stepping import MixerWeights

# Of a program: more wait for each other longer than they compute.
WARPS = 4
# Columns of a state's tile: 16 floats are 64 bytes of a row, and four threads have a row between them.
PIECE = 16
SHIFT_BLOCK = 1024


@triton.jit
def _remembered(window, weight, bias, at, inside, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """The convolution's sum over the window at some channels, and the tap of what is fed."""
    taps = weight + at * WIDTH
    total = tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(WIDTH - 1):
        value = tl.load(window + k * CHANNELS + at, mask=inside, other=0.0).to(tl.float32)
        total += value * tl.load(taps + k, mask=inside, other=0.0).to(tl.float32)
    return total, tl.load(taps + WIDTH - 1, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _convolved(total, tap, fed, at, inside):
    """SiLU of the convolution, once there is what is fed."""
    return silu(total + tap * tl.load(fed + at, mask=inside, other=0.0).to(tl.float32))


@triton.jit
def _shift(fed, window, at, inside, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Moves a window on by one token. Threads may hold an element twice: all have read it before one writes."""
    for k in tl.static_range(WIDTH - 1):
        source = fed + at if k == WIDTH - 2 else window + (k + 1) * CHANNELS + at
        value = tl.load(source, mask=inside, other=0.0)
        tl.debug_barrier()
        tl.store(window + k * CHANNELS + at, value.to(window.dtype.element_ty), mask=inside)


@triton.jit
def _head_norm(value, weight, at, eps, inside, SIZE: tl.constexpr):
    """The value of one head over its root mean square, times the weight; nothing without a weight."""
    if weight is not None:
        value = tl.where(inside, value, 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / SIZE + eps)
        value = value * scale * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def mix_heads(
    projected, conv_weight, conv_bias, a, d, dt_bias, norm, b_norm, c_norm, conv, state, out, eps,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
    WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The token's output [SIZE] of one head of one sequence, and the head's next state [SIZE, SIZE].

    The state comes in tiles of all rows and ``PIECE`` columns. Threads that hold some of a row make what the row needs
    each for itself, and add up what they have of it: of a tile as wide as the state 32 would, of these 4.
    """
    release(PDL)
    head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    INNER: tl.constexpr = HEADS * SIZE
    COMPACT: tl.constexpr = GROUPS * SIZE
    CHANNELS: tl.constexpr = 2 * COMPACT + INNER
    REPEAT: tl.constexpr = HEADS // GROUPS
    group = head // REPEAT
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    projected += batch * (INNER + CHANNELS + HEADS)
    states = state + (batch * HEADS + head) * SIZE * SIZE + at[:, None] * SIZE + tl.arange(0, PIECE)[None, :]
    PIECES: tl.constexpr = SIZE // PIECE
    decay, skip = tl.load(a + head), tl.load(d + head)
    step_bias = tl.load(dt_bias + head)
    fed, window = projected + INNER, conv + batch * (WIDTH - 1) * CHANNELS
    x_at, b_at, c_at = group * SIZE + at, COMPACT + group * SIZE + at, 2 * COMPACT + head * SIZE + at
    # state and window are the last step's, and between steps there is always a kernel that does not start early
    before = ()
    for i in tl.static_range(PIECES):
        held = tl.load(states + i * PIECE, mask=inside[:, None], other=0.0)
        before = before + (held,)  # type: ignore[assignment]  # noqa: RUF005
    x_sum, x_tap = _remembered(window, conv_weight, conv_bias, x_at, inside, CHANNELS, WIDTH)
    b_sum, b_tap = _remembered(window, conv_weight, conv_bias, b_at, inside, CHANNELS, WIDTH)
    c_sum, c_tap = _remembered(window, conv_weight, conv_bias, c_at, inside, CHANNELS, WIDTH)
    wait(PDL)
    x = _convolved(x_sum, x_tap, fed, x_at, inside)
    b = _convolved(b_sum, b_tap, fed, b_at, inside)
    c = _convolved(c_sum, c_tap, fed, c_at, inside)
    b, c = _head_norm(b, b_norm, at, eps, inside, SIZE), _head_norm(c, c_norm, at, eps, inside, SIZE)
    dt = softplus(tl.load(projected + INNER + CHANNELS + head).to(tl.float32) + step_bias)
    decay, product = tl.exp(dt * decay), tl.zeros([BLOCK, PIECE], tl.float32)
    tl.debug_barrier()  # small states are held by several threads: all have read before one writes
    for i in tl.static_range(PIECES):
        column = i * PIECE + tl.arange(0, PIECE)
        after = before[i] * decay + (dt * x)[:, None] * tl.gather(b, column, 0)[None, :]
        tl.store(states + i * PIECE, after, mask=inside[:, None])
        product += after * tl.gather(c, column, 0)[None, :]
    if REPEAT == 1:
        _shift(fed, window, x_at, inside, CHANNELS, WIDTH)
        _shift(fed, window, b_at, inside, CHANNELS, WIDTH)
        _shift(fed, window, c_at, inside, CHANNELS, WIDTH)
    y = tl.sum(product, 1) + skip * x
    z = tl.load(projected + head * SIZE + at, mask=inside, other=0.0).to(tl.float32)
    y = _head_norm(y * silu(z), norm + head * SIZE, at, eps, inside, SIZE)
    tl.store(out + batch * INNER + head * SIZE + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def shift_windows(
    projected, conv, row, begin, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """Moves the windows [WIDTH - 1, CHANNELS] on by one token; ``row`` is the length of a projected row."""
    release(PDL)
    at, batch = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    wait(PDL)
    window = conv + batch * (WIDTH - 1) * CHANNELS
    _shift(projected + batch * row + begin, window, at, at < CHANNELS, CHANNELS, WIDTH)


def mix(projected_BW: Tensor, weights: MixerWeights, conv_BTC: Tensor, state_BHPN: Tensor, pdl: bool) -> Tensor:
    """As ``stepping.mix``. Between two calls on one state there must be a kernel that does not start early."""
    dims, rows, width = weights.dims, len(projected_BW), weights.conv.shape[1]
    assert all(t.is_contiguous() for t in (conv_BTC, state_BHPN)), "updated in place as they lie"
    projected_BW, out = projected_BW.contiguous(), projected_BW.new_empty(rows, dims.inner)
    tensors = (weights.conv, weights.conv_bias, weights.a, weights.d, weights.dt_bias, weights.norm)
    launch = {"WIDTH": width, "PDL": pdl, "launch_pdl": pdl}
    shape = {"HEADS": dims.heads, "GROUPS": dims.kv_heads, "SIZE": dims.head_dim}
    shape["BLOCK"] = triton.next_power_of_2(dims.head_dim)
    shape["PIECE"] = math.gcd(PIECE, dims.head_dim)
    norms = (weights.b_norm, weights.c_norm)
    mix_heads[(dims.heads, rows)](
        projected_BW, *tensors, *norms, conv_BTC, state_BHPN, out, dims.eps, **shape, **launch, num_warps=WARPS
    )
    if dims.heads != dims.kv_heads:
        channels = conv_BTC.shape[2]
        grid = (triton.cdiv(channels, SHIFT_BLOCK), rows)
        shift_windows[grid](
            projected_BW, conv_BTC, dims.width, dims.inner, CHANNELS=channels, BLOCK=SHIFT_BLOCK, **launch
        )
    return out
