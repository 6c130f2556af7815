"""What a cached step cannot do without: its frozen parts and mixers each by itself, and its products alone.

The parts are the step's own modules, compiled or replayed as graphs where the step's are, on random states of the
step's sizes: frozen layers give gradients to their inputs and none to weights, layers below the first that trains run
forward alone, mixers and connector (where it trains) run forward and backward. What lies between them, the head, the
losses and the optimizer, is not in their sum. The products are all matrix products and attentions of a step by torch,
one after the other on random values; the scan's own are kernels and are missing.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from pipeline.models import body, connector, decoder
from pipeline.roofline import settled
from pipeline.surgery import mixers
from tests.bench.pair import Pair

WARM_UPS = 2
Work = Callable[[], object]


class Through(nn.Module):
    """Stands where a mixer stood and gives what it is given."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """The call signature of an attention module."""
        return hidden_states, None


class Parts:
    """A step's parts, each as a call."""

    def __init__(self, pair: Pair) -> None:
        self.pair, self.inner = pair, decoder(pair.student)
        shape = (pair.sizes.batch, pair.sizes.tokens, pair.made.text_config.hidden_size)
        self.hidden, self.gradient = (self._random(*shape) for _ in range(2))
        positions = torch.arange(pair.sizes.tokens, device=pair.device)[None]
        rotary: Any = self.inner.rotary_emb
        self.rotary = rotary(self.hidden, position_ids=positions)
        first = 0 if pair.sizes.image and "connector" in pair.parts else pair.plan.replaced[0]
        self.below = [i for i in pair.plan.kept if i < first]
        self.above = [i for i in pair.plan.kept if i >= first]

    def calls(self) -> dict[str, Work]:
        """The parts by name; those that do nothing in this step are left out."""
        found: dict[str, Work] = {
            "frozen layers, forward alone": lambda: self._forward(self.below),
            "frozen layers": lambda: self._both(self.above),
            "replaced layers around their mixers": self._around,
            "mixers": self._mixers,
        }
        if not self.below:
            del found["frozen layers, forward alone"]
        if self.pair.sizes.image:
            found |= {"vision tower": self._tower, "connector": self._connector}
        return found

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=self.pair.device)

    def _run(self, layers: Sequence[int], hidden: Tensor) -> Tensor:
        every: Any = self.inner.layers
        for index in layers:
            hidden = every[index](hidden, position_embeddings=self.rotary)
        return hidden

    @torch.no_grad()
    def _forward(self, layers: Sequence[int]) -> Tensor:
        return self._run(layers, self.hidden)

    def _both(self, layers: Sequence[int]) -> object:
        leaf = self.hidden.detach().requires_grad_()
        return torch.autograd.grad(self._run(layers, leaf), leaf, self.gradient)

    def _around(self) -> object:
        with self._without_mixers():
            return self._both(self.pair.plan.replaced)

    @contextmanager
    def _without_mixers(self) -> Iterator[None]:
        every: Any = self.inner.layers
        before = mixers(self.pair.student)
        for index in before:
            every[index].self_attn = Through()
        try:
            yield
        finally:
            for index, mixer in before.items():
                every[index].self_attn = mixer

    def _mixers(self) -> object:
        for mixer in mixers(self.pair.student).values():
            leaf = self.hidden.detach().requires_grad_()
            torch.autograd.grad(mixer(leaf)[0], [leaf, *mixer.parameters()], self.gradient)
        return None

    @torch.no_grad()
    def _tower(self) -> object:
        vision = self.pair.made.vision_config
        pixels = self._random(self.pair.sizes.batch, 3, vision.image_size, vision.image_size)
        tower: Any = body(self.pair.student).vision_tower
        return tower(pixels, output_hidden_states=self.pair.made.vision_feature_layer)

    def _connector(self) -> object:
        projector, vision = connector(self.pair.student), self.pair.made.vision_config
        assert projector is not None
        patches = (vision.image_size // vision.patch_size) ** 2 - 1
        out = projector(self._random(self.pair.sizes.batch, patches, vision.hidden_size))
        weights = [p for p in projector.parameters() if p.requires_grad]
        return torch.autograd.grad(out, weights, torch.ones_like(out)) if weights else out


@dataclass(frozen=True)
class Shape:
    """What is known of a tensor that an operation got."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def made(self) -> Tensor:
        """A tensor like it: random numbers, or zeros where they are whole."""
        count = 1 + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True)) if 0 not in self.size else 0
        values = torch.zeros(count, dtype=self.dtype, device=self.device)
        if self.dtype.is_floating_point:
            values.normal_()
        return values.as_strided(self.size, self.stride)


def _shape(value: object) -> object:
    if not isinstance(value, Tensor):
        return value
    return Shape(tuple(value.shape), value.stride(), value.dtype, value.device)


class Products(TorchDispatchMode):
    """While open, notes the products and attentions of what runs, backward passes included; called, repeats them."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Any, Any, Any]] = []
        self.tensors: dict[Shape, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in flop_registry or "scaled_dot_product" in func.overloadpacket.__name__:
            self.noted.append((func, tree_map(_shape, args), tree_map(_shape, kwargs)))
        return func(*args, **kwargs)

    @torch.no_grad()
    def __call__(self) -> None:
        """One after the other; operations of equal shapes share their tensors."""
        for func, args, kwargs in self.noted:
            func(*tree_map(self._tensor, args), **tree_map(self._tensor, kwargs))

    def _tensor(self, value: Any) -> Any:
        if not isinstance(value, Shape):
            return value
        if value not in self.tensors:
            self.tensors[value] = value.made()
        return self.tensors[value]


def milliseconds(work: Work, device: torch.device, rounds: int) -> float:
    """The median of the rounds, after some that warm up."""
    spent = []
    for _ in range(WARM_UPS + rounds):
        started = settled(device)
        work()
        spent.append(1000 * (settled(device) - started))
    return statistics.median(spent[WARM_UPS:])
