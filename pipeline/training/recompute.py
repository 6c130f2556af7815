"""The replaced layers' own attention, run on cached inputs: outputs and weights that need not be stored.

The target is then the teacher's function of the very input that the mixer sees, without the noise of a stored one.
"""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask


class TeacherLayers:
    """The attention modules that the mixers replaced, by layer, with their decoder's rotary embedding.

    Positions are places in the sequence, which is what right-padded text and Llava-like models have.
    """

    def __init__(self, attention: dict[int, nn.Module], decoder: nn.Module) -> None:
        self.attention = attention
        found: Any = decoder
        self.config, self.rotary = found.config, found.rotary_emb
        # Gemma 3 has an embedding for each kind of layer
        self.by_type = "layer_type" in inspect.signature(self.rotary.forward).parameters

    def to(self, device: torch.device) -> None:
        """Moves what is computed with; the rest of the decoder stays where it is."""
        for module in [*self.attention.values(), self.rotary]:
            module.to(device)

    @torch.no_grad()
    def output(self, layer: int, input_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """The attention's output [B, L, D] of its input; ``mask`` is 1 for real tokens, which come first."""
        return self._attend(self.attention[layer], layer, input_BLD, mask_BL)[0]

    @torch.no_grad()
    def weights(self, layer: int, input_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """The attention's softmax matrices [B, H, L, L] in float32, a query a row; rows of padding mean nothing.

        Only transformers' eager attention holds them. It runs in a shallow copy of the module, which has its own
        configuration and the same parameters.
        """
        attention: Any = copy.copy(self.attention[layer])
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation = "eager"
        return self._attend(attention, layer, input_BLD, mask_BL)[1].float()

    def _attend(self, attention: Any, layer: int, input_BLD: Tensor, mask_BL: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the module returns: its output and, where it holds them, its weights."""
        value = input_BLD.to(next(attention.parameters()).dtype)
        positions = torch.arange(value.shape[1], device=value.device).expand(value.shape[0], -1)
        mask = create_causal_mask(
            config=attention.config,
            inputs_embeds=value,
            attention_mask=mask_BL,
            past_key_values=None,
            position_ids=positions,
        )
        kind = {"layer_type": self.config.layer_types[layer]} if self.by_type else {}
        rotary = self.rotary(value, positions, **kind)
        output, weights = attention(hidden_states=value, position_embeddings=rotary, attention_mask=mask)
        return output, weights
