"""What a mixer remembers between calls, and its place in a transformers cache."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer


@dataclass(frozen=True)
class MixerState:
    """The last K-1 inputs of the convolution [B, K-1, C] and the recurrent state [B, H, P, N] in float32."""

    conv: Tensor
    recurrent: Tensor

    def split(self, row: int) -> tuple["MixerState", "MixerState"]:
        """The states of the rows before ``row``, and of the rest."""
        first = MixerState(self.conv[:row], self.recurrent[:row])
        return first, MixerState(self.conv[row:], self.recurrent[row:])

    def join(self, other: "MixerState") -> "MixerState":
        """The states of these rows, and the other's after them."""
        return MixerState(torch.cat([self.conv, other.conv]), torch.cat([self.recurrent, other.recurrent]))


class RecurrentLayer(LinearAttentionLayer, CacheLayerMixin):
    """A mixer's layer in a transformers cache; unlike transformers' own it also knows how many tokens it has seen.

    So a cache of nothing but mixers still has a length. Where other layers hold keys and values, their sizes count,
    because the attention masks are theirs.
    """

    supports_early_init = False
    is_sliding = False
    is_compileable = False

    def __init__(self, siblings: list[Any]) -> None:
        LinearAttentionLayer.__init__(self)
        CacheLayerMixin.__init__(self)
        self.siblings, self.seen = siblings, 0

    def read(self) -> MixerState | None:
        """The state after the tokens seen so far, None before the first."""
        conv, recurrent = self.conv_states[0], self.recurrent_states[0]
        return MixerState(conv, recurrent) if self.has_previous_state[0] else None

    def write(self, state: MixerState, tokens: int) -> None:
        """Keeps a copy of the state after ``tokens`` more tokens, in place, at a fixed address."""
        if not self.is_recurrent_states_initialized[0]:
            self.lazy_initialization(conv_states=state.conv, recurrent_states=state.recurrent)
        self.has_previous_state[0] = True
        self.conv_states[0].copy_(state.conv.detach())
        self.recurrent_states[0].copy_(state.recurrent.detach())
        self.seen += tokens

    def _attention(self) -> Any | None:
        """The first layer of the cache that holds keys and values, of the full kind where there is one."""
        others = [layer for layer in self.siblings if not isinstance(layer, RecurrentLayer)]
        return next((o for o in others if not o.is_sliding), others[0] if others else None)

    def get_seq_length(self) -> int:
        """Tokens seen."""
        attention = self._attention()
        return self.seen if attention is None else attention.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask for ``query_length`` new tokens covers."""
        attention = self._attention()
        return (self.seen + query_length, 0) if attention is None else attention.get_mask_sizes(query_length)

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Not for mixers.

        Raises:
            TypeError: always; an attention layer asked a mixer's place for keys and values.
        """
        raise TypeError("this layer of the cache belongs to a Mamba-2 mixer, which has no keys and values")

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        """A recurrent state cannot go back.

        Raises:
            RuntimeError: tokens are to be removed.
        """
        if tokens_to_remove:
            raise RuntimeError("a Mamba-2 mixer's state cannot forget its last tokens; no assisted generation")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row ``repeats`` times."""
        self._each(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the chosen rows."""
        self._each(lambda t: t[indices])

    def _each(self, change: Any) -> None:
        if self.has_previous_state[0]:
            self.conv_states[0] = change(self.conv_states[0])
            self.recurrent_states[0] = change(self.recurrent_states[0])


def recurrent_layer(cache: Cache, index: int) -> RecurrentLayer:
    """The mixer's layer of a cache; whatever empty layer transformers put in its place gives way."""
    while len(cache.layers) <= index:  # a cache made without a configuration grows as it is used
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if not isinstance(layer, RecurrentLayer):
        assert getattr(layer, "keys", None) is None or layer.get_seq_length() == 0, "an attention layer's cache"
        layer = cache.layers[index] = RecurrentLayer(cache.layers)
    return layer
