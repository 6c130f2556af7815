"""How fast a model can decode at best: the bytes that a step must move over the bandwidth that the device has.

Owns the bytes of a model in decoding, the two formulas made of them (time of a step, memory) and the measurement of a
device's bandwidth. A step reads every weight of the decoder and the head once, the keys and values of the layers that
keep their attention for every token seen, and reads and writes each mixer's state. Nothing else costs anything: no
kernel starts, no activations. Models with experts read fewer weights a step than this counts.
"""

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from pipeline.mixer import D_CONV
from pipeline.models import decoder, head
from pipeline.surgery import attention_projections, mixers
from schemas.hybrid import MixerDims

STATE_BYTES = 4  # recurrent states are float32 whatever the model's type
# Far beyond every cache: the largest last-level ones hold some hundred megabytes on CPUs and 60 on GPUs.
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
COPIES = 15


@dataclass(frozen=True)
class KeptLayer:
    """A layer with attention: bytes of a token's key and value, and how many tokens it attends to, None for all."""

    token_bytes: int
    window: int | None = None

    def cached_bytes(self, context: int) -> int:
        """Keys and values of one sequence of ``context`` tokens."""
        return self.token_bytes * (context if self.window is None else min(context, self.window))

    def read_bytes(self, context: int, steps: int) -> int:
        """What one sequence reads of them in ``steps`` steps, the first of which attends to ``context + 1`` tokens."""
        growing = steps if self.window is None else min(steps, max(0, self.window - context))
        grown = growing * context + growing * (growing + 1) // 2
        return self.token_bytes * (grown + (steps - growing) * (self.window or 0))


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model in decoding.

    ``held`` are all weights in memory, ``read`` those that a step needs (not the vision tower, and of the input
    embeddings single rows only), ``states`` those of all mixers for one sequence.
    """

    held: int
    read: int
    kept: tuple[KeptLayer, ...]
    states: int

    def cached_bytes(self, context: int) -> int:
        """Keys and values of one sequence of ``context`` tokens, over all layers that keep their attention."""
        return sum(layer.cached_bytes(context) for layer in self.kept)

    def step_bytes(self, batch: int, context: int) -> int:
        """Bytes that a step moves where each of ``batch`` sequences attends to ``context`` tokens."""
        return self.read + batch * (self.cached_bytes(context) + 2 * self.states)

    def decode_bytes(self, batch: int, context: int, steps: int) -> int:
        """Bytes of ``steps`` steps in a row after a prompt of ``context`` tokens; each adds a token to attend to."""
        cached = sum(layer.read_bytes(context, steps) for layer in self.kept)
        return steps * (self.read + batch * 2 * self.states) + batch * cached

    def tokens_per_second(self, batch: int, context: int, bandwidth: float, steps: int | None = None) -> float:
        """The roofline over ``steps`` steps after a prompt; of a single one at exactly ``context`` if None."""
        moved = self.step_bytes(batch, context) if steps is None else self.decode_bytes(batch, context, steps)
        return batch * (steps or 1) * bandwidth / moved

    def memory_bytes(self, batch: int, context: int) -> int:
        """Weights, keys, values and states of ``batch`` sequences of ``context`` tokens; activations not counted."""
        return self.held + batch * (self.cached_bytes(context) + self.states)

    def largest_batch(self, memory: float, context: int) -> int:
        """How many sequences of ``context`` tokens ``memory`` bytes have room for beside the weights."""
        each = self.memory_bytes(1, context) - self.held
        return max(0, int((memory - self.held) // each))


def footprint(model: PreTrainedModel) -> Footprint:
    """The bytes of a model, by its own tensors; they may be on the meta device."""
    inner, linear = decoder(model), head(model)
    embedded = {id(p) for p in model.get_input_embeddings().parameters()} - {id(p) for p in linear.parameters()}
    used = {id(p): p for module in (inner, linear) for p in module.parameters() if id(p) not in embedded}
    replaced, layers = mixers(model), DynamicCache(config=inner.config).layers
    kept = [i for i in range(len(layers)) if i not in replaced]
    attentions: list[Any] = [layer.self_attn for layer in inner.layers]  # type: ignore[union-attr]
    return Footprint(
        held=_bytes({id(t): t for t in (*model.parameters(), *model.buffers())}.values()),
        read=_bytes(used.values()),
        kept=tuple(KeptLayer(_token_bytes(attentions[i]), getattr(layers[i], "sliding_window", None)) for i in kept),
        states=sum(state_bytes(m.dims, m.in_proj.weight.element_size()) for m in replaced.values()),
    )


def state_bytes(dims: MixerDims, itemsize: int) -> int:
    """One sequence's state of one mixer: the convolution's last inputs, and the recurrence's in float32."""
    channels = 2 * dims.compact + dims.inner
    return (D_CONV - 1) * channels * itemsize + dims.inner * dims.head_dim * STATE_BYTES


def _token_bytes(attention: nn.Module) -> int:
    """A token's key and value in one layer."""
    _, k, v, _ = attention_projections(attention)
    return (k.out_features + v.out_features) * k.weight.element_size()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second of large copies on a device, read and written ones both counted: median, least and most."""

    median: float
    least: float
    most: float


def copy_bandwidth(device: torch.device, size: int | None = None) -> Bandwidth:
    """Measures copies of ``size`` bytes, one at a time, after one that does not count."""
    source = torch.ones(size or COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    rates = sorted(2 * source.numel() / _copy(source, target) for _ in range(COPIES))
    return Bandwidth(statistics.median(rates), rates[0], rates[-1])


def _copy(source: Tensor, target: Tensor) -> float:
    """Seconds of one copy."""
    begin = settled(source.device)
    target.copy_(source)
    return settled(source.device) - begin


def settled(device: torch.device) -> float:
    """The clock in seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
