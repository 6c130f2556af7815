"""What a signal costs to cache and to compute again, and the answer: cache it, cache a slice, or recompute.

Two rules. Money: a signal is worth caching while its storage costs no more a month than the teacher passes that it
saves, or next to nothing. Time: while an accelerator can read it as fast as it trains; a slower one waits for its data.
"""

from dataclasses import dataclass
from math import inf
from typing import Literal

from pipeline.planning.compute import ModelSize
from pipeline.planning.lengths import Lengths
from pipeline.planning.signals import Signal
from schemas.accelerators import Accelerator, Storage
from schemas.sections import Dtype

Answer = Literal["cache", "bounded slice", "recompute"]
# A training step from the cache in units of the teacher's forward on the same tokens: the student's forward and its
# activations' gradients; most weights are frozen and have none. Gradient checkpointing would make it 3 and need less.
STEP = 2.0
# Dollars a month that are not worth anyone's thought, whatever the passes would cost.
NEXT_TO_NOTHING = 1.0
# Fewer tapped samples than this do not teach the mixers: the demo aligns on 1,500.
LEAST_SLICE = 1000


@dataclass(frozen=True)
class Cost:
    """One signal's figures: the pass (or part of one) that computes it, one accelerator's rates, the store's price.

    At ``break_even_passes`` a month the passes cost what the storage does. ``largest_fraction`` is the largest share of
    the samples that both rules allow.
    """

    pass_seconds: float
    pass_dollars: float
    write_bytes_per_second: float
    read_bytes_per_second: float
    dollars_per_month: float
    break_even_passes: float
    largest_fraction: float
    answer: Answer


def cost(
    signal: Signal,
    size: ModelSize,
    lengths: Lengths,
    accelerator: Accelerator,
    storage: Storage,
    dtype: Dtype,
    passes: float,
) -> Cost:
    """What the signal costs, if ``passes`` teacher passes a month are what not caching it would take."""
    seconds = size.pass_flops(lengths, signal.head_positions) / accelerator.flops(dtype)
    spared = seconds * signal.spared
    dollars = spared / 3600 * accelerator.dollars_per_hour
    monthly = signal.bytes / 1e9 * storage.dollars_per_gb_month
    read = signal.bytes / (STEP * seconds)
    worth = max(passes * dollars, NEXT_TO_NOTHING)
    allowed = min(worth / monthly if monthly else inf, storage.read_rate / read if read else inf)
    share = min(1.0, allowed * (signal.fraction or 1.0))
    return Cost(
        pass_seconds=spared,
        pass_dollars=dollars,
        write_bytes_per_second=signal.bytes / seconds,
        read_bytes_per_second=read,
        dollars_per_month=monthly,
        break_even_passes=monthly / dollars,
        largest_fraction=share,
        answer=_answer(signal, allowed, share * lengths.samples),
    )


def _answer(signal: Signal, allowed: float, samples: float) -> Answer:
    if allowed >= 1:
        return "cache"
    return "bounded slice" if signal.fraction is not None and samples >= LEAST_SLICE else "recompute"
