"""Where the keys, values and states of a batch lie: fixed memory that a captured graph can be replayed on.

Rows are padded on the left, so that all of them stand at the same slot. Shapes: B rows, G key-value heads, S slots,
D head dimension.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from pipeline.models import decoder
from pipeline.states import RecurrentLayer
from pipeline.surgery import mixers


class Cursor:
    """Where a batch stands.

    ``seen`` counts the slots that the prompts have filled so far, on the host; while ``stepping``, ``slot`` [1] says
    on the device where the next token of every row goes. ``first`` [B] is each row's first slot that is no padding;
    ``padded`` whether there is any.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self.seen, self.stepping, self.padded = 0, False, False
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.first = torch.zeros(batch, dtype=torch.int64, device=device)


class StaticKeys(CacheLayerMixin):
    """Keys and values of one layer [B, G, S, D], which never move."""

    supports_early_init = False
    is_sliding = False

    def __init__(self, cursor: Cursor, slots: int) -> None:
        super().__init__()
        self.cursor, self.slots = cursor, slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes room for heads such as these [B, G, any, D]."""
        # zeros: slots that no token has reached are loaded beside others and must at least be numbers
        self.keys, self.values = (t.new_zeros(*t.shape[:2], self.slots, t.shape[3]) for t in (key_states, value_states))
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Writes [B, G, new, D] at the cursor; gives what is filled of a prompt, and all slots while stepping."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.cursor.stepping:
            self.keys.index_copy_(2, self.cursor.slot, key_states)
            self.values.index_copy_(2, self.cursor.slot, value_states)
            return self.keys, self.values
        begin, end = self.cursor.seen, self.cursor.seen + key_states.shape[2]
        assert end <= self.slots, "more tokens than there is room for"
        self.keys[:, :, begin:end] = key_states
        self.values[:, :, begin:end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Slots that the prompts have filled."""
        return self.cursor.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask would cover."""
        return self.cursor.seen + query_length, 0

    def get_max_length(self) -> int:
        """Slots."""
        return self.slots


def static_cache(model: PreTrainedModel, cursor: Cursor, slots: int) -> Cache:
    """An empty cache of ``slots`` tokens a row: room for layers with attention, states for mixers."""
    replaced, count = mixers(model), len(decoder(model).layers)  # type: ignore[arg-type]
    made = {i: StaticKeys(cursor, slots) for i in range(count) if i not in replaced}
    held: list[Any] = list(made.values())  # not the cache's own list, which would refer to itself and so linger
    return Cache(layers=[made.get(i) or RecurrentLayer(held) for i in range(count)])


def forget(cache: Cache, cursor: Cursor) -> None:
    """Empties the states and puts the cursor at the start; keys and values need no emptying."""
    cursor.seen, cursor.stepping, cursor.padded = 0, False, False
    cursor.slot.zero_()
    cursor.first.zero_()
    for layer in cache.layers:
        if isinstance(layer, RecurrentLayer):
            layer.reset()
