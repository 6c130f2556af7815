"""The shards of an artifact in order, folded from what their footers say."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

MANIFEST = "manifest.json"


class ShardInfo(BaseModel):
    """One committed shard: ``checksum`` is over its values, ``digest`` the SHA-256 of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    index: int
    name: str
    rows: int
    bytes: int
    checksum: str
    digest: str


class Manifest(BaseModel):
    """All shards of a finished artifact, in order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    table: str
    version: int
    fingerprint: str
    shards: tuple[ShardInfo, ...]

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(s.rows for s in self.shards)

    @property
    def shard_rows(self) -> tuple[int, ...]:
        """Rows of each shard, in order."""
        return tuple(s.rows for s in self.shards)


def shard_name(index: int) -> str:
    """The file name of a shard."""
    return f"shard-{index:06d}.parquet"


def is_shard(name: str) -> bool:
    """Whether a file name is a shard's."""
    return name.startswith("shard-") and name.endswith(".parquet")


def missing_shards(count: int, present: Sequence[str]) -> list[int]:
    """Which of ``count`` shards are not among the committed names."""
    names = set(present)
    return [i for i in range(count) if shard_name(i) not in names]
