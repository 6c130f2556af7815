"""A shard's row between the decoding task and the teacher: pixels go through Arrow as they are, and without a copy."""

import numpy as np
import pyarrow as pa
import pytest

from jobs.cache import features_of, features_row

GENERATOR = np.random.default_rng(0)
FEATURES = [
    {"pixel_values": GENERATOR.standard_normal((2, 3, 4, 4), np.float32), "image_sizes": np.array([[4, 4], [3, 4]])},
    {},
    {"pixel_values": GENERATOR.standard_normal((1, 3, 4, 4), np.float32), "image_sizes": np.array([[2, 2]])},
]


@pytest.mark.parametrize("at", [0, 1])
def test_features_come_back_as_they_were_also_from_a_slice_of_rows(at: int) -> None:
    rows = pa.concat_tables([features_row(7, FEATURES[2:]), features_row(8, FEATURES)]).combine_chunks()
    expected = [FEATURES[2:], FEATURES][at]
    found = features_of(rows.slice(at, 1), len(expected))
    assert [f.keys() for f in found] == [f.keys() for f in expected]
    for mine, theirs in zip(found, expected, strict=True):
        for name, array in theirs.items():
            assert mine[name].dtype == array.dtype
            np.testing.assert_array_equal(mine[name], array)


def test_features_lie_in_the_rows_memory() -> None:
    row = features_row(0, FEATURES)
    buffer = row["data"].chunk(0).values.buffers()[2]
    for features in features_of(row, len(FEATURES)):
        for array in features.values():
            assert buffer.address <= array.ctypes.data < buffer.address + buffer.size


def test_a_row_without_images_has_no_features() -> None:
    assert features_of(features_row(0, [{}, {}]), 2) == [{}, {}]
