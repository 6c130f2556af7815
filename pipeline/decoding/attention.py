"""Attention of the decoding engine, as transformers calls it: over a static cache, with rows padded on the left.

It is registered under a name that has no mask function, so that transformers makes no masks; what they would say is in
the cursor. Shapes: B rows, H heads, G key-value heads, L new tokens, T tokens with those before, D head dimension.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, PreTrainedModel

from pipeline.decoding.room import Cursor
from pipeline.models import attention_kinds, decoder
from pipeline.ops.stepping import StepOps

NAME = "decant"


def attention(
    module: nn.Module,  # noqa: ARG001 - every interface has it
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,  # noqa: ARG001 - every interface has it
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    cursor: Cursor,
    step_ops: StepOps,
    **_: Any,
) -> tuple[Tensor, None]:
    """Output [B, L, H, D] of queries [B, H, L, D] over what the cache gave."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if cursor.stepping:
        out = step_ops.attend(
            query[:, :, 0], None, None, None, key, value, cursor.slot, cursor.first, scale, sliding_window, softcap
        )
        return out.view(query.shape[0], 1, *query.shape[1::2]), None
    return _over_prompt(query, key, value, cursor, scale, sliding_window, softcap).transpose(1, 2), None


def _over_prompt(
    query: Tensor, key: Tensor, value: Tensor, cursor: Cursor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """[B, H, L, D]: the last L tokens' attention to T; without a mask in memory where none is needed."""
    new, length = query.shape[2], key.shape[2]
    if cursor.padded or softcap is not None or (window is not None and window < length):
        mask = _mask(cursor, new, length, window)
        return _masked(query, *_repeated(query, key, value), mask, scale, softcap)
    if new == length or new == 1:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=new > 1, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    key, value = _repeated(query, key, value)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=causal_lower_right(new, length), scale=scale)


def _mask(cursor: Cursor, new: int, length: int, window: int | None) -> Tensor:
    """[B, 1, L, T]: what each token attends to; padding attends to itself, so that it stays a number."""
    keys = torch.arange(length, device=cursor.first.device)
    own = keys[-new:, None]
    seen = (keys <= own) & (keys >= cursor.first[:, None, None, None])
    if window is not None:
        seen = seen & (keys > own - window)
    return seen | (keys == own)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32)
    return weights.to(query.dtype) @ value


def _repeated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, one head for each of the queries'."""
    times = query.shape[1] // key.shape[1]
    return (key, value) if times == 1 else (key.repeat_interleave(times, 1), value.repeat_interleave(times, 1))


def attends_here(model: PreTrainedModel) -> bool:
    """Whether this module computes what the model's own attention does.

    Not where the attention is written out in the model's own code, sees chunks, or has sinks: such models keep theirs.
    """
    inner: Any = decoder(model)
    kinds = attention_kinds(inner.config)
    sinks = any(getattr(layer.self_attn, "sinks", None) is not None for layer in inner.layers)
    return bool(inner._supports_attention_backend) and kinds <= {"full_attention", "sliding_attention"} and not sinks


@contextmanager
def engine_attention(model: PreTrainedModel) -> Iterator[None]:
    """While open, the decoder's layers attend by this module."""
    config: Any = decoder(model).config
    own, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = own


AttentionInterface.register(NAME, attention)
