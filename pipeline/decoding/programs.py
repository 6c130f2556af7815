"""A decoding step of whole layers by a few fused operations, for the decoders whose layers are known here.

Phi's block, whose attention and MLP read one norm and add to one residual, is two operations, the second of which makes
what the next block reads; Llama's and its kin's, where one follows the other, three. A mixer takes attention's place in
either. Other decoders step through their own code. Shapes: B rows, D hidden size, R rotated dimensions, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.phi.modeling_phi import PhiDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from pipeline.decoding.room import Cursor, StaticKeys
from pipeline.mixer import Mamba2Mixer
from pipeline.models import decoder, head, logits_head
from pipeline.ops.stepping import Activation, LayerNorm, MixerWeights, Norm, Projection, RmsNorm, StepOps, Term
from pipeline.states import RecurrentLayer
from pipeline.surgery import attention_projections

Rotary = tuple[Tensor, Tensor]
# A token mixer's part of a layer: what it projects, and what it makes of that for its output projection.
Mixing = Callable[[list[Tensor], Rotary, Any], Tensor]
SEQUENTIAL = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer)


@dataclass(frozen=True)
class TokenMixer:
    """Attention or a mixer between its projections: ``run`` makes of ``parts``' outputs what ``output`` projects."""

    parts: tuple[Projection, ...]
    run: Mixing
    output: nn.Linear


@dataclass(frozen=True)
class Reading:
    """What a part of the model reads of the residual: projections of its norm."""

    norm: Norm
    parts: tuple[Projection, ...]


@dataclass(frozen=True)
class Layer:
    """A decoder layer as operations; ``middle`` is the norm before the MLP, None where both read the first one."""

    mixer: TokenMixer
    norm: Norm
    middle: Norm | None
    rise: Projection
    fall: nn.Linear

    @property
    def reading(self) -> Reading:
        """What the layer begins with."""
        return Reading(self.norm, self.mixer.parts if self.middle else (*self.mixer.parts, self.rise))

    def step(
        self, ops: StepOps, x_BD: Tensor, read: list[Tensor], rotary: Rotary, place: Any, following: Reading
    ) -> tuple[Tensor, list[Tensor]]:
        """The layer's output [B, D] of x, of which it ``read`` its projections, and what the following part reads.

        Keys and values or the state at ``place`` change.
        """
        mixed = _term(self.mixer.run(read[: len(self.mixer.parts)], rotary, place), self.mixer.output)
        if self.middle is None:
            return ops.advance(x_BD, (mixed, _term(read[-1], self.fall)), following.norm, following.parts)
        x_BD, (risen,) = ops.advance(x_BD, (mixed,), self.middle, (self.rise,))
        return ops.advance(x_BD, (_term(risen, self.fall),), following.norm, following.parts)


class FusedDecoder:
    """A model's step, from a token's embedding to its logits."""

    def __init__(self, model: PreTrainedModel, ops: StepOps, layers: Sequence[Layer], slots: int) -> None:
        self.ops, self.layers = ops, layers
        inner: Any = decoder(model)
        # once for all positions that there is room for: ten small kernels that no step has to start
        places, like = torch.arange(slots, device=model.device)[None], inner.embed_tokens.weight
        self.rotary = torch.cat([table[0] for table in inner.rotary_emb(like, position_ids=places)], -1)
        norm = _norm(inner.final_layernorm if isinstance(inner.layers[0], PhiDecoderLayer) else inner.norm)
        linear = head(model)
        self.readings = [layer.reading for layer in layers]
        self.readings.append(Reading(norm, (Projection(linear.weight, linear.bias),)))

    def logits(self, embeds_BD: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """[B, V] of embeddings [B, D] at positions [B, 1]."""
        cos, sin = F.embedding(positions[:, 0], self.rotary).chunk(2, -1)
        x, first = embeds_BD, self.readings[0]
        read = self.ops.project(x, first.norm, first.parts)
        for layer, place, following in zip(self.layers, cache.layers, self.readings[1:], strict=True):
            x, read = layer.step(self.ops, x, read, (cos, sin), place, following)
        return read[0]


def fused_decoder(model: PreTrainedModel, ops: StepOps, cursor: Cursor, slots: int) -> FusedDecoder | None:
    """The model's step by fused operations, for up to ``slots`` tokens; None where a layer or the head is not known."""
    layers: Any = decoder(model).layers
    found = [_layer(layer, ops, cursor) for layer in layers]
    known = [layer for layer in found if layer is not None]
    if len(known) < len(found) or logits_head(model) is not head(model):
        return None
    return FusedDecoder(model, ops, known, slots)


def _layer(layer: Any, ops: StepOps, cursor: Cursor) -> Layer | None:
    """The layer as operations, None if it is not known."""
    if type(layer) is PhiDecoderLayer:
        rise, fall, middle, gate = layer.mlp.fc1, layer.mlp.fc2, None, None
        activation = _activation(layer.mlp.activation_fn)
    elif type(layer) in SEQUENTIAL:
        rise, fall, gate = layer.mlp.up_proj, layer.mlp.down_proj, layer.mlp.gate_proj
        activation, middle = _activation(layer.mlp.act_fn), _norm(layer.post_attention_layernorm)
    else:
        return None
    mixer = _token_mixer(layer.self_attn, ops, cursor)
    if mixer is None or activation is None:
        return None
    gates = (None, None) if gate is None else (gate.weight, gate.bias)
    projection = Projection(rise.weight, rise.bias, activation, *gates)
    return Layer(mixer, _norm(layer.input_layernorm), middle, projection, fall)


def _token_mixer(module: Any, ops: StepOps, cursor: Cursor) -> TokenMixer | None:
    if isinstance(module, Mamba2Mixer):
        return _recurrent(module, ops)
    if getattr(module, "qk_layernorm", False):
        return None
    return _attending(module, ops, cursor)


def _recurrent(module: Mamba2Mixer, ops: StepOps) -> TokenMixer:
    weights, parts = MixerWeights.of(module), (Projection(module.in_proj.weight, module.in_proj.bias),)

    def run(projected: list[Tensor], _: Rotary, place: RecurrentLayer) -> Tensor:
        return ops.mix(projected[0], weights, place.conv_states[0], place.recurrent_states[0])

    return TokenMixer(parts, run, module.out_proj)


def _attending(module: Any, ops: StepOps, cursor: Cursor) -> TokenMixer:
    *inputs, output = attention_projections(module)
    scale, width = float(module.scaling), int(module.head_dim)
    # Mistral's layers follow the configuration, the others hold their own
    window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))

    def run(projected: list[Tensor], rotary: Rotary, place: StaticKeys) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, width)) for t in projected)
        where = (place.keys, place.values, cursor.slot, cursor.first)
        return ops.attend(q, k, v, rotary, *where, scale, window)

    return TokenMixer(tuple(Projection(p.weight, p.bias) for p in inputs), run, output)


def _term(x: Tensor, linear: nn.Linear) -> Term:
    return Term(x, linear.weight, linear.bias)


def _norm(module: Any) -> Norm:
    if isinstance(module, nn.LayerNorm):
        return LayerNorm(module.weight, module.bias, module.eps)
    return RmsNorm(module.weight, module.variance_epsilon)


def _activation(module: nn.Module) -> Activation | None:
    """What the activation is called, None for another one: found by using it."""
    probe = torch.linspace(-4, 4, 9)
    known: dict[Activation, Callable[[Tensor], Tensor]] = {
        "gelu_tanh": nn.GELU(approximate="tanh"),
        "gelu": nn.GELU(),
        "silu": nn.SiLU(),
        "relu": nn.ReLU(),
    }
    value = module(probe)
    return next(
        (name for name, same in known.items() if torch.allclose(same(probe), value, rtol=1e-6, atol=1e-7)), None
    )
