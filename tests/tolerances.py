"""Every tolerance of the tests, with its reason, in one place."""

import torch

# float64 sums of a few thousand terms of size one: rounding stays below 1e-12; gradients add one more such sum.
FLOAT64 = 1e-10
# float32 logits of a small model: two orders of summation differ by some units in the last place of values up to ten.
FLOAT32_LOGITS = 2e-5
# An imported checkpoint's, of up to 15: the same operations in the same order, but for gelu_new, which is one kernel
# here and eight operations in the original.
IMPORTED_LOGITS = 1e-5
# The same for gradients of sums over a vocabulary: closed forms and autograd round in other places, each to 2^-24 of
# terms of size one.
FLOAT32_GRADIENT = 1e-5
# Ten steps from the cache and online, as shares of a loss and of a gradient's norm: the same sums in another order,
# each off by some 1e-6, and steps of AdamW in which small gradients of either sign weigh as much as large ones.
PARITY = 1e-4
# Losses and norms of nine steps by other engines and other numbers of workers, which sum in another order: each step's
# difference of 1e-7 goes on into the next through AdamW, whose first steps give every gradient the same size.
ENGINE_CURVE = 1e-4
# A proportion estimated from n draws strays further than five standard deviations once in two million times.
SIGMAS = 5.0
# bfloat16 keeps eight bits: half a unit in the last place is 2^-9 of the value.
BFLOAT16_RELATIVE = 2.0**-8
# The scan in float32 against float64, as a share of the norm: decays are exponentials of differences of sums over a
# chunk, whose rounding (2^-24 of values up to a hundred) is the relative error of every weight.
FLOAT32_SCAN = 1e-5
# Logits of up to 5 from four random layers, relative and absolute. Chunks regroup the scan's sums, and each norm over
# eight values amplifies what rounding left; in float64 the same comparisons must agree to many more digits.
CACHED_LOGITS = 1e-4
PADDED_LOGITS = 1e-5
FLOAT64_LOGITS = 1e-10
# Kernels against float64, as a share of the norm. float32: the scan's bound with as many roundings again, since the
# kernels regroup sums. bfloat16: inputs are exact, but scores, states and the backward's products are rounded to 2^-9
# four deep, and dA, dD and ddt are sums of terms of both signs that are several times larger than what is left.
KERNEL_RELATIVE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}
# Whole mixers divide by norms of a head, which takes out of some gradients most of what they are sums of and leaves the
# rounding, in plain torch as well: a kernel may be this much worse than plain torch in the same type.
KERNEL_OVER_TORCH = 4.0
# The same operations in another grouping; in bfloat16 plain torch rounds (2^-9) at other places than the fused kernel.
STOCK_MAMBA2 = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
# Half a unit in the last place of float16's ten bits.
FLOAT16_LOGPROB = 2.0**-11
# Of float8 e4m3's three; and what that leaves of a normal token's norm: 2.6 % is the mean over three bits.
FP8_RELATIVE = 2.0**-4
FP8_NORM = 0.03
# What the plan promises of a cache's bytes. The rows' small columns are planned as zstd leaves them on the whole.
PLANNED_BYTES = 0.05
# The known bytes of draws (21 a position) are not compressed; zstd takes 6 % off them.
KNOWN_BYTES = 0.08
# The known pass (4.0 H200-hours) counts the embedding as a product and the head at every position, 7 % of the FLOPs.
KNOWN_PASS = 0.12
# Norms and biases are counted as products (1 %), and torch counts causal attention whole or not at all (3 %).
COUNTED_FLOPS = 0.05
# Losses and parameters after six steps of one engine against another's, relative and absolute: each regroups the sums
# over micro-batches and workers (2^-24 each), and Adam makes of a gradient's relative error one of a step of 0.02.
FLOAT32_ENGINES = 5e-6
# Losses and norms beside a bfloat16 body, where the last bits of float32 decide now and then about one of bfloat16's
# eight, and stage 3's linear maps add the bias after a rounding of their own: a few times 2^-9, more in a gradient.
BFLOAT16_ENGINES = 2e-2
# JPEG at quality 95, in 255ths, in the middle of blocks of one colour: colours are rounded twice and quantised by 2.
JPEG_LEVELS = 4
# One decoding step's operations in float32, absolute and relative: sums of some dozen terms of size one in two orders.
FLOAT32_STEP = 1e-5
# A step's kernels against plain torch, as a share of the norm. bfloat16: both round their results (2^-9); tensor cores
# take the normed input and the attention's weights rounded as well, each again 2^-9.
STEP_KERNEL = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
