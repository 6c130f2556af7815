"""``argmax`` of a decoding step in Triton: programs share a row of logits, a second kernel takes their greatest.

Torch's own has one program a row, which goes through a vocabulary alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.ops.step_device import release, wait
from pipeline.ops.step_products import launch_options

# Logits of one program.
BLOCK = 1024
WARPS = 4
# What the kernels compare without rounding.
TYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def greatest_of_blocks(logits, bests, places, V, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """The greatest logit of each block of each row [B, V], and the first place where it stands: [B, blocks]."""
    release(PDL)
    batch, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    value = tl.load(logits + batch * V + at, mask=at < V, other=float("-inf")).to(tl.float32)
    best, place = tl.max(value, 0, return_indices=True)
    found = batch * tl.num_programs(1) + block
    tl.store(bests + found, best)
    tl.store(places + found, block * BLOCK + place)


@triton.jit
def greatest_of_row(bests, places, out, V, BLOCKS: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr):
    """The place of the greatest of one row's blocks; always one that there is, whatever the logits are."""
    release(PDL)
    batch, block = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED)
    wait(PDL)
    value = tl.load(bests + batch * BLOCKS + block, mask=block < BLOCKS, other=float("-inf"))
    place = tl.load(places + batch * BLOCKS + block, mask=block < BLOCKS, other=0)
    _, first = tl.max(value, 0, return_indices=True)
    chosen = tl.sum(tl.where(block == first, place, 0), 0)
    tl.store(out + batch, tl.minimum(chosen, V - 1).to(tl.int64))


def argmax(logits_BV: Tensor, out_B: Tensor, pdl: bool) -> None:
    """As ``stepping.argmax``."""
    if logits_BV.dtype not in TYPES:
        torch.argmax(logits_BV, -1, out=out_B)
        return
    rows, size = logits_BV.shape
    blocks = triton.cdiv(size, BLOCK)
    bests = torch.empty(rows, blocks, dtype=torch.float32, device=logits_BV.device)
    places = torch.empty(rows, blocks, dtype=torch.int32, device=logits_BV.device)
    launch = launch_options(WARPS, pdl)
    greatest_of_blocks[(rows, blocks)](logits_BV.contiguous(), bests, places, size, BLOCK=BLOCK, **launch)
    padded = triton.next_power_of_2(blocks)
    greatest_of_row[(rows,)](bests, places, out_B, size, BLOCKS=blocks, PADDED=padded, **launch)
