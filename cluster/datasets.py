"""Datasets whose every row is one shard: a descriptor goes in, and one call of a worker commits what it describes."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.data import Dataset

# A cluster on which nothing at all moves for this long is stuck; a shard of a large teacher takes minutes.
NO_PROGRESS_SECONDS = 1800.0


def shard_dataset(descriptors: Sequence[dict[str, Any]]) -> "Dataset":
    """A dataset of one row, and one block, a descriptor."""
    import ray.data
    from ray.data import DataContext

    context = DataContext.get_current()
    context.target_max_block_size = None  # a block is a shard, whatever its size
    context.execution_no_progress_timeout_s = NO_PROGRESS_SECONDS
    context.enable_progress_bars = False  # ours counts samples
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray.data.from_items(list(descriptors), override_num_blocks=len(descriptors))
