"""Buffers of taps: what a shard's rows have, whatever the room."""

import pyarrow as pa
import pytest
import torch

from pipeline.activations import pack
from pipeline.taps import TapBuffers


def columns(tokens: list[int], room: int) -> dict[str, pa.Array]:
    buffers = TapBuffers(tokens, pinned=False, room=room)
    for row, count in enumerate(tokens):
        if count:
            value = torch.arange(count * 4.0).view(count, 4) + row
            buffers.keep("tap_0_input", row, pack(value, "bfloat16"))
    return buffers.columns()


@pytest.mark.parametrize("tokens", [[0, 3, 0, 2], [1], [0, 0]])
def test_room_that_is_left_is_no_part_of_a_column(tokens: list[int]) -> None:
    exact, roomy = columns(tokens, 0), columns(tokens, 100)
    assert exact.keys() == roomy.keys()
    for name, values in exact.items():
        assert values.equals(roomy[name])
        assert [None if v is None else len(v) for v in roomy[name].to_pylist()] == [c * 8 or None for c in tokens]
        assert roomy[name].buffers()[2].size == sum(tokens) * 8, "what is written is what there is"
