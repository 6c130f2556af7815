"""What a store holds: every artifact with its state and size, and what one artifact's shards are made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from pipeline.shards import column_bytes, read_manifest
from pipeline.stage import read_record
from pipeline.store import Store
from schemas.artifacts import ArtifactRecord, ArtifactRef
from schemas.errors import ArtifactDrift, ShardCorrupt
from schemas.manifest import MANIFEST, Manifest, ShardInfo, is_shard
from schemas.tables import Table

State = Literal["done", "unfinished", "damaged", "not made"]
T = TypeVar("T")
# Shards read for a picture or for the columns' sizes: 64 of 256 samples give every share to a percent, in seconds.
SHARDS_READ = 64


@dataclass(frozen=True)
class Entry:
    """One artifact on disk: ``files`` are its objects' sizes in bytes, ``rows`` those of its shards once done."""

    ref: ArtifactRef
    state: State
    files: dict[str, int]
    record: ArtifactRecord | None = None
    rows: int | None = None

    @property
    def shards(self) -> int:
        """Committed shards."""
        return sum(map(is_shard, self.files))

    @property
    def bytes(self) -> int:
        """Bytes of all objects."""
        return sum(self.files.values())


def artifacts(store: Store, kinds: Sequence[str]) -> list[ArtifactRef]:
    """Every artifact of the given kinds that the store holds anything of, by kind, name and version."""
    found = [ArtifactRef.parse(f"{kind}/{name}") for kind in kinds for name in store.names(kind)]
    return sorted((r for r in found if r), key=lambda r: (kinds.index(r.kind), r.name, r.version))


def entry(store: Store, ref: ArtifactRef) -> Entry:
    """What is on disk of one artifact; damage of its record or manifest is a state, not an error."""
    files = store.sizes(str(ref))
    try:
        record = read_record(store, ref)
        if record is None:
            return Entry(ref, "unfinished" if files else "not made", files)
        rows = read_manifest(store, ref).rows if MANIFEST in files else None
        return Entry(ref, "done", files, record, rows)
    except ShardCorrupt:
        return Entry(ref, "damaged", files)


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of the items, evenly spread."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else list(items)


@dataclass(frozen=True)
class Shards:
    """An artifact's shards: all of them, those that were ``read``, and each column's bytes on disk over all.

    Where not all were read, the bytes are scaled up by the shards' sizes.
    """

    all: tuple[ShardInfo, ...]
    read: tuple[ShardInfo, ...]
    columns: dict[str, int]


def shards_of(store: Store, ref: ArtifactRef, table: Table) -> Shards:
    """Measures a finished artifact's shards.

    Raises:
        ArtifactDrift: they are of another version of the table.
        ShardCorrupt: manifest or a shard cannot be read.
    """
    manifest = read_manifest(store, ref)
    _refuse_other(store, ref, manifest, table)
    chosen = tuple(spread(manifest.shards, SHARDS_READ))
    sizes = column_bytes(store, ref, manifest.model_copy(update={"shards": chosen}))
    scale = sum(s.bytes for s in manifest.shards) / sum(s.bytes for s in chosen)
    return Shards(manifest.shards, chosen, {name: round(size * scale) for name, size in sizes.items()})


def _refuse_other(store: Store, ref: ArtifactRef, manifest: Manifest, table: Table) -> None:
    if (manifest.table, manifest.version) != (table.name, table.version):
        raise ArtifactDrift(
            f"{store.path(str(ref))}: expected table {table.name} version {table.version}, got {manifest.table} "
            f"version {manifest.version}: another version of decant made it, which alone can describe it"
        )
