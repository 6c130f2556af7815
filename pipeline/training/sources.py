"""What training reads targets from: the run's own cache and, where several teachers are mixed, the caches of others."""

from dataclasses import dataclass

from schemas.artifacts import ArtifactRef
from schemas.config import CacheConfig
from schemas.tables import Table


@dataclass(frozen=True)
class Source:
    """One teacher's finished cache: its artifact, the settings that it was made with and its shards' table.

    ``share`` is what its divergence counts of the whole; the shares of a training's sources sum to 1. Of several, the
    first is the run's own, from which taps and features come as well.
    """

    ref: ArtifactRef
    cache: CacheConfig
    table: Table
    share: float = 1.0
