"""Greedy generation with a clock: one plain loop for teachers and students alike, and transformers' ``generate()``.

Both take the same prompts, generate exactly so many tokens (no end token ends them) and are engines of one signature,
so that another can stand beside them. The loop reserves the room of keys and values once, where transformers' dynamic
cache would copy all of them at every token and so tax the layers that keep their attention; mixers keep their states in
the same cache. Prompts are read in pieces, which bounds the memory of activations and keeps every tensor within what
the kernels can index.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from pipeline.mixer import MAX_ELEMENTS, Mamba2Mixer
from pipeline.models import decoder
from pipeline.roofline import settled
from pipeline.states import recurrent_layer
from pipeline.surgery import mixer_dims, mixers

# Tokens of all sequences that one call reads of the prompts. A prompt in one piece needs no mask, so the fastest
# attention serves; more pieces at once would take more memory for activations than keys and values need.
PREFILL_TOKENS = 65536


@dataclass(frozen=True)
class Decoded:
    """Generated tokens [B, new], seconds until the first of each row was there, and seconds for all others."""

    tokens: Tensor
    first: float
    rest: float


# Generates so many tokens after prompts [B, L].
Engine = Callable[[PreTrainedModel, Tensor, int], Decoded]


class ReservedLayer(DynamicLayer):
    """Keys and values of one layer in room for ``length`` tokens; what it gives is a view of the filled part."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.filled = length, 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Writes [B, heads, new, dim] of each behind what is there; returns all, [B, heads, seen, dim]."""
        if not self.filled:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values = (self._room(states) for states in (key_states, value_states))
            self.is_initialized = True
        begin, self.filled = self.filled, self.filled + key_states.shape[-2]
        assert self.filled <= self.length, "more tokens than there is room for"
        self.keys[..., begin : self.filled, :] = key_states
        self.values[..., begin : self.filled, :] = value_states
        return self.keys[..., : self.filled, :], self.values[..., : self.filled, :]

    def _room(self, states: Tensor) -> Tensor:
        return states.new_empty(*states.shape[:-2], self.length, states.shape[-1])

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.filled


def reserved_cache(model: PreTrainedModel, length: int) -> DynamicCache:
    """An empty cache for ``length`` tokens: mixers' states, reserved room; layers with a window keep transformers' own.

    It is a dynamic cache to transformers, because hybrids refuse static ones.
    """
    cache, replaced = DynamicCache(config=decoder(model).config), mixers(model)
    for index, layer in enumerate(cache.layers):
        if index in replaced:
            recurrent_layer(cache, index)
        elif type(layer) is DynamicLayer:
            cache.layers[index] = ReservedLayer(length)
    return cache


def piece_length(model: PreTrainedModel, batch: int, tokens: int = PREFILL_TOKENS) -> int:
    """Tokens of each of ``batch`` prompts that one call reads: at most ``tokens`` in all, and as the kernels allow.

    Teacher and student get the same: of a layer with attention the width counts that a mixer in its place would have.
    """
    layers: Any = decoder(model).layers
    first = layers[0].self_attn
    dims = first.dims if isinstance(first, Mamba2Mixer) else mixer_dims(first, bias=False)
    return max(1, min(tokens, MAX_ELEMENTS // dims.width) // batch)


@torch.no_grad()
def decode(model: PreTrainedModel, prompts: Tensor, new_tokens: int, piece: int | None = None) -> Decoded:
    """Engine ``loop``: the prompts [B, L] in pieces, then one token of every row at a time.

    ``piece`` is as ``piece_length`` says if None.
    """
    batch, length = prompts.shape
    parts = prompts.split(piece or piece_length(model, batch), dim=1)
    begin = settled(model.device)
    cache, token = reserved_cache(model, length + new_tokens), prompts
    for part in parts:
        token = _next(model, part, cache)
    found, first = [token], settled(model.device)
    for _ in range(new_tokens - 1):
        token = _next(model, token, cache)
        found.append(token)
    return Decoded(torch.cat(found, 1), first - begin, settled(model.device) - first)


def _next(model: PreTrainedModel, tokens: Tensor, cache: DynamicCache) -> Tensor:
    """The most probable token [B, 1] after these [B, L] and what the cache has seen."""
    logits = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1].argmax(-1, keepdim=True)


class _FirstToken(StoppingCriteria):
    """Never stops; notes when it was first asked, which is after the first token."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002 - by name
        if self.at is None:
            self.at = settled(input_ids.device)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def decode_by_generate(model: PreTrainedModel, prompts: Tensor, new_tokens: int) -> Decoded:
    """Engine ``generate``: transformers' own, with its dynamic cache and the whole prompts in one call."""
    clock = _FirstToken()
    begin = settled(model.device)
    out = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=None,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    end = settled(model.device)
    assert clock.at is not None
    return Decoded(out[:, prompts.shape[1] :], clock.at - begin, end - clock.at)


ENGINES: dict[str, Engine] = {"loop": decode, "generate": decode_by_generate}


def random_prompts(model: PreTrainedModel, batch: int, length: int, seed: int) -> Tensor:
    """Token ids [batch, length] by seed, on the model's device: none of those with a meaning, such as an image's."""
    special = _special_ids(model.config) | _special_ids(model.config.get_text_config())
    vocabulary = model.get_input_embeddings().num_embeddings
    plain = torch.tensor([i for i in range(int(vocabulary)) if i not in special])
    chosen = torch.randint(len(plain), (batch, length), generator=torch.Generator().manual_seed(seed))
    return plain[chosen].to(model.device)


def _special_ids(config: Any) -> set[int]:
    """What the configuration names as some token's id."""
    named = [value for name, value in config.to_dict().items() if name.endswith(("token_id", "token_index"))]
    return {i for value in named for i in (value if isinstance(value, list) else [value]) if i is not None}
