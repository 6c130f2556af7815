"""What ``tests.bench.steps`` measures: a step's operations and chains of whole layers, with their bytes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.mixer import D_CONV, Mamba2Mixer
from pipeline.ops.stepping import LayerNorm, MixerWeights, Norm, Projection, RmsNorm, StepOps, Term, activated
from schemas.hybrid import MixerDims

LAYERS = 32
Run = Callable[[StepOps], list[Tensor]]
Reading = tuple[Norm | None, Sequence[Projection]]


@dataclass(frozen=True)
class Shape:
    """A decoder layer's sizes; ``gated`` ones are Llama's, the others Phi's, with biases and both branches at once."""

    hidden: int
    heads: int
    groups: int
    size: int
    inner: int
    rotated: int
    gated: bool

    @property
    def dims(self) -> MixerDims:
        return MixerDims(self.hidden, self.heads, self.groups, self.size, bias=False)


PHI = Shape(2560, 32, 32, 80, 10240, 32, gated=False)
GROUPED = Shape(4096, 32, 8, 128, 14336, 128, gated=True)
SMALL = Shape(32, 4, 4, 8, 64, 4, gated=False)
SMALL_GROUPED = Shape(32, 4, 2, 8, 64, 8, gated=True)


@dataclass(frozen=True)
class Case:
    """One operation on one copy of its tensors: how to run it, torch's own way if there is one, bytes that it moves,
    and the tensors that it changes."""

    run: Run
    torch_way: Callable[[], list[Tensor]] | None
    moved: int
    states: tuple[Tensor, ...] = ()
    rows: int = 1


class Maker:
    """Random tensors on a device, small enough that layers neither grow nor vanish."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def numbers(self, *shape: int, size: float = 1.0) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype) * size

    def weight(self, n: int, k: int) -> Tensor:
        return self.numbers(n, k, size=k**-0.5)

    def norm(self, shape: Shape) -> Norm:
        weight = 1.0 + self.numbers(shape.hidden, size=0.1)
        return RmsNorm(weight, 1e-5) if shape.gated else LayerNorm(weight, self.numbers(shape.hidden), 1e-5)

    def projections(self, shape: Shape, *sizes: int) -> list[Projection]:
        bias = not shape.gated
        return [Projection(self.weight(n, shape.hidden), self.numbers(n) if bias else None) for n in sizes]

    def mlp(self, shape: Shape) -> Projection:
        weight = self.weight(shape.inner, shape.hidden)
        if shape.gated:
            return Projection(weight, None, "silu", self.weight(shape.inner, shape.hidden))
        return Projection(weight, self.numbers(shape.inner), "gelu_tanh")


def project_case(make: Maker, shape: Shape, batch: int, kind: str) -> Case:
    """``kind``: attention, mixer or mlp."""
    inner, compact = shape.heads * shape.size, shape.groups * shape.size
    sizes = {"attention": [inner, compact, compact], "mixer": [shape.dims.width], "mlp": []}[kind]
    parts = make.projections(shape, *sizes)
    if kind == "mlp" or not shape.gated:
        parts.append(make.mlp(shape))
    x, norm = make.numbers(batch, shape.hidden), make.norm(shape)
    outs = sum(len(p.weight) for p in parts) * batch
    moved = sum(_bytes(p.weight, p.bias, p.gate) for p in parts) + _bytes(x) + outs * x.element_size()
    return Case(lambda ops: ops.project(x, norm, parts), lambda: torch_project(x, norm, parts), moved, rows=batch)


def torch_project(x: Tensor, norm: Norm, parts: Sequence[Projection]) -> list[Tensor]:
    """Norm, linear layers and activations one by one."""
    if isinstance(norm, LayerNorm):
        x = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    else:
        x = F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)
    found = []
    for part in parts:
        value = F.linear(x, part.weight, part.bias)
        gate = value if part.gate is None else F.linear(x, part.gate, part.gate_bias)
        found.append(activated(gate, part.activation) * (1 if part.gate is None else value))
    return found


def reduce_case(make: Maker, shape: Shape, batch: int, sizes: Sequence[int]) -> Case:
    residual, bias = make.numbers(batch, shape.hidden), None if shape.gated else make.numbers(shape.hidden)
    terms = [Term(make.numbers(batch, k), make.weight(shape.hidden, k), bias) for k in sizes]

    def torch_way() -> list[Tensor]:
        out = residual
        for term in terms:
            out = out + F.linear(term.x, term.weight, term.bias)
        return [out]

    moved = 2 * _bytes(residual) + sum(_bytes(t.x, t.weight, t.bias) for t in terms)
    return Case(lambda ops: [ops.advance(residual, terms, None, ())[0]], torch_way, moved, rows=batch)


class Cache:
    """Keys, values and what else ``attend`` takes, of ``context`` tokens and the new one behind them."""

    def __init__(self, make: Maker, shape: Shape, batch: int, context: int) -> None:
        self.shape, self.batch, self.slots = shape, batch, context + 1
        self.keys, self.values = (make.numbers(batch, shape.groups, self.slots, shape.size) for _ in range(2))
        angles = torch.rand(batch, shape.rotated // 2, device=make.device).repeat(1, 2)
        self.rotary = angles.cos().to(make.dtype), angles.sin().to(make.dtype)
        self.position = torch.full((1,), context, device=make.device)
        self.first = torch.zeros(batch, dtype=torch.int64, device=make.device)

    def attend(self, ops: StepOps, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.view(self.batch, -1, self.shape.size) for t in (q, k, v))
        ends = (self.position, self.first, self.shape.size**-0.5)
        return ops.attend(q, k, v, self.rotary, self.keys, self.values, *ends, None, None)


def attend_case(make: Maker, shape: Shape, batch: int, context: int) -> Case:
    cache = Cache(make, shape, batch, context)
    q = make.numbers(batch, shape.heads, shape.size)
    k, v = (make.numbers(batch, shape.groups, shape.size) for _ in range(2))

    def torch_way() -> list[Tensor]:
        grouped = shape.heads != shape.groups
        return [F.scaled_dot_product_attention(q[:, :, None], cache.keys, cache.values, enable_gqa=grouped).flatten(1)]

    return Case(lambda ops: [cache.attend(ops, q, k, v)], torch_way, _bytes(cache.keys, cache.values))


def mixer_state(make: Maker, shape: Shape, batch: int) -> tuple[MixerWeights, Tensor, Tensor]:
    dims = shape.dims
    with torch.no_grad(), make.device:
        mixer = Mamba2Mixer(replace(dims, hidden=8), 0).to(make.dtype)  # its projections are not needed
    conv = make.numbers(batch, D_CONV - 1, 2 * dims.compact + dims.inner)
    state = torch.zeros(batch, dims.heads, dims.head_dim, dims.head_dim, device=make.device)
    return MixerWeights.of(mixer), conv, state


def mix_case(make: Maker, shape: Shape, batch: int) -> Case:
    weights, conv, state = mixer_state(make, shape, batch)
    projected = make.numbers(batch, shape.dims.width)
    moved = 2 * _bytes(state, conv) + _bytes(projected, weights.conv)
    return Case(lambda ops: [ops.mix(projected, weights, conv, state)], None, moved, (conv, state))


@dataclass(frozen=True)
class Layer:
    """A whole layer, with attention or mixer; what it reads of the residual, its bytes and the states it changes.

    ``run`` makes of the residual, and of what the layer read of it, the next residual and what is read of that.
    """

    run: Callable[[StepOps, Tensor, list[Tensor], Reading], tuple[Tensor, list[Tensor]]]
    reading: Reading
    moved: int
    states: tuple[Tensor, ...]


def chain_layer(make: Maker, shape: Shape, batch: int, context: int, kind: str) -> Layer:
    inner, compact = shape.heads * shape.size, shape.groups * shape.size
    sizes = [shape.dims.width] if kind == "mixer" else [inner, compact, compact]
    norm, parts, mlp = make.norm(shape), make.projections(shape, *sizes), make.mlp(shape)
    out, down = make.weight(shape.hidden, inner), make.weight(shape.hidden, shape.inner)
    moved = sum(_bytes(p.weight, p.bias, p.gate) for p in [*parts, mlp]) + _bytes(out, down)
    states: tuple[Tensor, ...] = ()
    if kind == "mixer":
        weights, conv, state = mixer_state(make, shape, batch)
        states = (conv, state)
        moved += 2 * _bytes(*states)
    else:
        cache = Cache(make, shape, batch, context)
        moved += _bytes(cache.keys, cache.values)

    def sequence(ops: StepOps, projected: list[Tensor]) -> Tensor:
        if kind == "mixer":
            return ops.mix(projected[0], weights, conv, state)
        return cache.attend(ops, *projected[:3])

    def layer(ops: StepOps, x: Tensor, read: list[Tensor], following: Reading) -> tuple[Tensor, list[Tensor]]:
        mixed = Term(sequence(ops, read), out)
        if not shape.gated:
            return ops.advance(x, [mixed, Term(read[-1], down)], *following)
        x, (risen,) = ops.advance(x, [mixed], norm, [mlp])
        return ops.advance(x, [Term(risen, down)], *following)

    return Layer(layer, (norm, parts if shape.gated else [*parts, mlp]), moved, states)


def chain_case(make: Maker, shape: Shape, batch: int, context: int, kind: str, layers: int) -> Case:
    made = [chain_layer(make, shape, batch, context, kind) for _ in range(layers)]
    start = make.numbers(batch, shape.hidden)

    def run(ops: StepOps) -> list[Tensor]:
        x, read = start, ops.project(start, *made[0].reading)
        for layer, following in zip(made, [*(layer.reading for layer in made[1:]), (None, [])], strict=True):
            x, read = layer.run(ops, x, read, following)
        return [x]

    return Case(run, None, sum(layer.moved for layer in made), tuple(t for layer in made for t in layer.states))


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def cases(shape: Shape, grouped: Shape, small: bool) -> Iterator[tuple[str, Callable[[Maker], Case], bool]]:
    """Name and maker of every operation and chain, and whether one is enough for a graph."""
    for name, s in (("phi", shape), ("grouped", grouped)):
        inner = s.heads * s.size
        for b in (1,) if small else (1, 2, 4, 8, 16, 64):
            for kind in ("attention", "mixer") + (("mlp",) if s.gated else ()):
                yield f"{name} project {kind} {b}", lambda m, s=s, b=b, k=kind: project_case(m, s, b, k), False
            for sizes in ([inner], [s.inner]) if s.gated else ([inner, s.inner],):
                label = "+".join(map(str, sizes))
                yield f"{name} reduce {label} {b}", lambda m, s=s, b=b, z=sizes: reduce_case(m, s, b, z), False
            yield f"{name} mix {b}", lambda m, s=s, b=b: mix_case(m, s, b), False
        for b, c in ((2, 9),) if small else ((1, 1024), (1, 16384), (1, 65536), (8, 1024), (16, 4096), (64, 4096)):
            yield f"{name} attend {b} x {c}", lambda m, s=s, b=b, c=c: attend_case(m, s, b, c), False
        yield from chains(name, s, small)


def chains(name: str, s: Shape, small: bool) -> Iterator[tuple[str, Callable[[Maker], Case], bool]]:
    """Whole layers one after another; fewer where their caches would not fit the device."""
    points = ((2, 9, 2),) if small else ((1, 1024, LAYERS), (1, 16384, LAYERS), (8, 1024, LAYERS), (16, 4096, 16))
    for b, c, n in points:
        label = f"{name} {n} layers of attention {b} x {c}"
        yield label, lambda m, b=b, c=c, n=n: chain_case(m, s, b, c, "attention", n), True
        if c <= 4096:
            label = f"{name} {n} layers of mixer {b} x {c}"
            yield label, lambda m, b=b, n=n: chain_case(m, s, b, 1, "mixer", n), True
