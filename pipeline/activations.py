"""How activations [tokens, D] are kept: bfloat16 bits, or float8 (e4m3) with a scale a token.

Eight bits with a scale a token leave 2.6 % of the norm as noise and, unlike integers, survive tokens with spikes. Bytes
a value: 2, or 1 and 4 more a token. They are read as they are stored and widened where they are used, on the device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from schemas.sections import ActivationType

# The largest finite float8 e4m3.
FP8_MAX = 448.0


@dataclass(frozen=True)
class Activation:
    """Stored: ``values`` [..., D] in bfloat16, or float8's bits in uint8 with ``scale`` [...] in float32."""

    values: Tensor
    scale: Tensor | None = None

    def wide(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[..., D] in a type to compute in."""
        if self.scale is None:
            return self.values.to(dtype)
        return (self.values.view(torch.float8_e4m3fn).float() * self.scale[..., None]).to(dtype)

    def tokens(self, chosen: slice) -> "Activation":
        """Those of some tokens, along the first dimension."""
        return Activation(self.values[chosen], None if self.scale is None else self.scale[chosen])

    def map(self, change: Callable[[Tensor], Tensor]) -> "Activation":
        """The same with every tensor changed, such as moved to another device."""
        return Activation(change(self.values), None if self.scale is None else change(self.scale))


def join(parts: Sequence[Activation]) -> Activation:
    """One after the other along the tokens."""
    scales = [p.scale for p in parts if p.scale is not None]
    return Activation(torch.cat([p.values for p in parts]), torch.cat(scales) if scales else None)


def pad(parts: Sequence[Activation]) -> Activation:
    """[B, longest, D], zeros on the right."""
    stack = torch.nn.utils.rnn.pad_sequence
    scales = [p.scale for p in parts if p.scale is not None]
    values = stack([p.values for p in parts], batch_first=True)
    return Activation(values, stack(scales, batch_first=True) if scales else None)


def pack(value_LD: Tensor, dtype: ActivationType) -> Activation:
    """As it will be stored, on the device where it is."""
    if dtype == "bfloat16":
        return Activation(value_LD.to(torch.bfloat16))
    wide = value_LD.float()
    # a token of zeros has any scale; 1 keeps it finite
    scale_L = (wide.abs().amax(-1) / FP8_MAX).where(wide.abs().amax(-1) > 0, 1.0)
    packed = (wide / scale_L[:, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return Activation(packed.view(torch.uint8), scale_L)


def stored_parts(name: str, packed: Activation) -> dict[str, Tensor]:
    """What goes to disk under the columns ``NAME`` and, for float8, ``NAME_scale``; a token a row."""
    if packed.scale is None:
        return {name: packed.values.view(torch.int16)}
    return {name: packed.values, f"{name}_scale": packed.scale}


def encode_activation(name: str, packed: Activation) -> dict[str, bytes]:
    """The columns' values for one sample, of an activation on the CPU."""
    return {part: value.contiguous().numpy().tobytes() for part, value in stored_parts(name, packed).items()}


def decode_activation(name: str, row: Mapping[str, Any], tokens: int, dtype: ActivationType) -> Activation:
    """The activations [tokens, D] of one row."""
    if dtype == "bfloat16":
        return Activation(_tensor(row[name], torch.bfloat16).view(tokens, -1))
    scale = _tensor(row[f"{name}_scale"], torch.float32)
    return Activation(_tensor(row[name], torch.uint8).view(tokens, -1), scale)


def _tensor(data: Any, dtype: torch.dtype) -> Tensor:
    """The buffer's own memory as a tensor, where it is aligned: nothing may write to it."""
    buffer = pa.py_buffer(data)
    if buffer.address % dtype.itemsize:  # values of several columns' widths stand close together in a shard
        buffer = pa.py_buffer(buffer.to_pybytes())
    return from_dlpack(pa.Array.from_buffers(pa.uint8(), buffer.size, [None, buffer])).view(dtype)
