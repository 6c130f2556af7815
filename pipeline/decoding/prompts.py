"""What a decoder is given of a batch of prompts: their embeddings, images among them, and positions; read in pieces.

The vision tower and the connector run once, in the model's own code, which also says where image tokens stand.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.mixer import MAX_ELEMENTS
from pipeline.models import body, decoder, has_image_positions

# Activations of a piece of the prompts may take this share of what weights, keys, values and states take...
ACTIVATIONS = 0.015
# ... but pieces of all rows together have at least so many tokens, and masks at most so many elements.
LEAST_TOKENS, MASK_ELEMENTS = 2048, 2**28


@dataclass(frozen=True)
class Embedded:
    """Prompts as the decoder takes them.

    ``ids`` [B, L], ``embeds`` [B, L, D] where images are among them, ``positions`` [B, L] or [axes, B, L]; ``keep``
    [B, L] is 1 at real tokens, None where all are; ``first`` [B] is the number of padding tokens before each.
    """

    ids: Tensor
    embeds: Tensor | None
    positions: Tensor
    keep: Tensor | None
    first: Tensor

    def part(self, model: PreTrainedModel, where: slice) -> Tensor:
        """Embeddings of these tokens; of text they are made here, since those of all take gigabytes."""
        if self.embeds is not None:
            return self.embeds[:, where]
        return model.get_input_embeddings()(self.ids[:, where])


class _ReachedError(Exception):
    """Carries what a decoder was called with."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__("the decoder has been reached")
        self.given = given


def embedded(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Embedded:
    """What the decoder is given for a left-padded batch; ``inputs`` as the model takes them, on its device."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    given = {"inputs_embeds": None, "position_ids": None}
    if set(inputs) - {"input_ids", "attention_mask", "mm_token_type_ids"}:
        own = {} if has_image_positions(model.config) else {"position_ids": places}
        given = _decoder_inputs(model, {**inputs, **own})
    positions = given["position_ids"]
    return Embedded(
        ids,
        given["inputs_embeds"],
        places if positions is None else positions,
        None if bool(mask.all()) else mask,
        (mask == 0).sum(-1),
    )


def _decoder_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the model's own forward calls its decoder with, which does not run."""

    def stop(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        raise _ReachedError(kwargs)

    hook = decoder(model).register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        body(model)(**inputs, use_cache=False)
    except _ReachedError as reached:
        return reached.given
    finally:
        hook.remove()
    raise AssertionError("a model that does not call its decoder")


def piece_length(model: PreTrainedModel, batch: int, slots: int) -> int:
    """Tokens of each of ``batch`` prompts that one call reads, where rows have room for ``slots`` tokens.

    Activations stay small beside weights, keys and values, and every tensor within what the kernels can index. It goes
    by the configuration alone, so that teacher and student get the same.
    """
    config: Any = decoder(model).config
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    size = getattr(config, "head_dim", None) or hidden // heads
    cached = 2 * size * (getattr(config, "num_key_value_heads", None) or heads)
    known = getattr(config, "intermediate_size", None)
    inner = known if isinstance(known, int) else 4 * hidden
    weights = hidden * (2 * heads * size + cached + 2 * inner)
    held = config.num_hidden_layers * (weights + batch * slots * cached) + config.vocab_size * hidden
    widest = 2 * heads * size + cached + heads  # a mixer's first projection
    most = max(LEAST_TOKENS, int(ACTIVATIONS * held / (4 * inner + 12 * hidden)))
    tokens = min(most, MAX_ELEMENTS // widest)
    return max(1, min(tokens // batch, MASK_ELEMENTS // (batch * slots)))
