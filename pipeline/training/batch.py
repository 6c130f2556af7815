"""One micro-batch of cached rows as tensors, and its way to the device."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.activations import Activation
from pipeline.targets import Targets


@dataclass(frozen=True)
class TapBatch:
    """Inputs and outputs (None: to be recomputed) by layer, each [B, L, D], and the mask [B, L] of real tokens."""

    layers: dict[int, tuple[Activation, Activation | None]]
    mask: Tensor


@dataclass(frozen=True)
class Totals:
    """Counts over a whole step and all workers, by which sums become means.

    ``positions`` have a target, ``supervised`` ones a token of the answer after them; ``tapped`` samples have
    ``tap_tokens``.
    """

    samples: int
    positions: int
    supervised: int
    tapped: int
    tap_tokens: int
    tokens: int


@dataclass(frozen=True)
class Batch:
    """One worker's micro-batch.

    ``items`` are the samples' places in the cache, ``last`` says that it ends the worker's step. ``inputs`` are the
    model's keywords (empty where no model runs): rows are padded on the right, which no causal model sees, so there is
    no mask. ``positions`` [P, 2] are (row, position) pairs with their ``gold`` tokens [P], whether those are
    ``supervised`` [P], and ``targets``; ``others`` are other teachers' targets at the same positions. ``tokens`` and
    ``padding`` count the micro-batch's own. ``held_out`` ones are looked at and not trained on.
    """

    items: np.ndarray
    last: bool
    totals: Totals
    inputs: dict[str, Tensor] = field(default_factory=dict)
    positions: Tensor | None = None
    gold: Tensor | None = None
    supervised: Tensor | None = None
    targets: Targets | None = None
    others: tuple[Targets, ...] = ()
    taps: TapBatch | None = None
    tokens: int = 0
    padding: int = 0
    held_out: bool = False

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same with every tensor that belongs on the device changed."""
        taps = self.taps and TapBatch(
            {k: (u.map(change), a and a.map(change)) for k, (u, a) in self.taps.layers.items()},
            change(self.taps.mask),
        )
        positions, gold, supervised = (
            None if t is None else change(t) for t in (self.positions, self.gold, self.supervised)
        )
        return replace(
            self,
            inputs={k: change(v) for k, v in self.inputs.items()},
            positions=positions,
            gold=gold,
            supervised=supervised,
            targets=self.targets and self.targets.map(change),
            others=tuple(t.map(change) for t in self.others),
            taps=taps,
        )


Sent = tuple[Batch, "torch.cuda.Event | None"]


class Copier:
    """Copies to a CUDA device on a stream of its own, from pinned memory, while the device computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, batch: Batch) -> Sent:
        """Starts the copy, in the thread that made the batch."""
        if self.stream is None:
            return batch, None
        with torch.cuda.stream(self.stream):
            moved = batch.map(lambda t: t.pin_memory().to(self.device, non_blocking=True))
            event = torch.cuda.Event()
            event.record(self.stream)
        return moved, event

    def receive(self, sent: Sent) -> Batch:
        """The batch, for use on the current stream once the copy is there."""
        batch, event = sent
        if event is None:
            return batch
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(event)

        def used(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        return batch.map(used)
