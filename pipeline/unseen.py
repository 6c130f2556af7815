"""Which cached samples a student was never trained on, by itself or by the students that it started from."""

from dataclasses import dataclass

from pipeline.shards import read_manifest, read_shard
from pipeline.stage import require
from pipeline.store import Store
from pipeline.training.index import is_held_out
from pipeline.training.sources import Source
from schemas.artifacts import ArtifactRecord, ArtifactRef
from schemas.config import CacheConfig, RunConfig
from schemas.errors import ArtifactDrift, ConfigInvalid
from schemas.evaluation import DistributionConfig
from schemas.tables import SAMPLES, recorded_cache, targets_table

# Where a student could be measured on samples that it was not trained on.
REMEDIES = (
    "train one with a larger distill.validation.fraction (0.05, say), or name in evaluate.distribution.cache a cache "
    "that the same teacher made of other samples"
)


@dataclass(frozen=True)
class Unseen:
    """A cache, its samples, and which of them to leave out.

    Of the rows those count that ``fraction``, which is that of the training ``by``, holds out and whose ids are not
    among ``trained``. ``tapped`` are the cache's tapped layers.
    """

    source: Source
    samples: ArtifactRef
    tapped: tuple[int, ...]
    fraction: float
    by: ArtifactRef
    trained: frozenset[str] = frozenset()

    @property
    def cache(self) -> CacheConfig:
        """The settings that the cache was made with."""
        return self.source.cache

    def none_left(self, rows: int) -> str:
        """What to tell a user where none of the ``rows`` samples is left."""
        why = (
            f"this student was trained on all {rows} samples of {self.samples}"
            if self.trained
            else f"distill.validation.fraction ({self.fraction}) of {self.by}, by which this student was trained, "
            f"holds out none of the {rows} samples of {self.samples}"
        )
        return f"evaluate.distribution: {why}; {REMEDIES}"


def unseen(store: Store, run: RunConfig, config: DistributionConfig) -> Unseen:
    """The cache to measure on: the run's own, or the one that ``config`` names.

    Raises:
        ArtifactMissing: a cache, its samples or an earlier student is not there.
        ArtifactDrift: the samples are not those that the cache was made from any more.
        ConfigInvalid: the other cache is of another teacher.
    """
    own = require(store, run.ref("cache"))
    other = config.other()
    if other is None or other == run.ref("cache"):
        # who is in the smallest of these fractions is in all of them
        least = min(trainings(store, run), key=lambda r: r.distill.validation.fraction)
        return _unseen(store, own, least.distill.validation.fraction, least.ref("distill"))
    record = require(store, other)
    if record.identity["settings"]["teacher"] != own.identity["settings"]["teacher"]:
        raise ConfigInvalid(
            f"evaluate.distribution.cache: {store.path(str(other))}: is of another teacher than {own.ref}, so that it "
            "does not say how far the student is from its own; cache these samples with this run's teacher"
        )
    return _unseen(store, record, 1.0, run.ref("distill"), _trained(store, trainings(store, run)))


def trainings(store: Store, run: RunConfig) -> list[RunConfig]:
    """The run and those that made the students which its own started from, latest first."""
    found = [run]
    while earlier := found[-1].earlier():
        found.append(RunConfig.model_validate(require(store, earlier).config))
    return found


def _unseen(
    store: Store, record: ArtifactRecord, fraction: float, by: ArtifactRef, trained: frozenset[str] = frozenset()
) -> Unseen:
    cache, tapped = recorded_cache(record)
    ((name, fingerprint),) = record.identity["inputs"].items()
    samples, ref = ArtifactRef.parse(name), ArtifactRef.parse(record.ref)
    assert samples is not None
    assert ref is not None
    if require(store, samples).fingerprint != fingerprint:
        raise ArtifactDrift(
            f"{store.path(name)}: was made anew since {record.ref} was made from it; remove {store.path(record.ref)} "
            "and run `decant cache RUN.yaml` again"
        )
    return Unseen(Source(ref, cache, targets_table(cache, tapped)), samples, tapped, fraction, by, trained)


def _trained(store: Store, runs: list[RunConfig]) -> frozenset[str]:
    """The ids of all samples that one of the runs trained on."""
    found: set[str] = set()
    for run in runs:
        fraction, ref = run.distill.validation.fraction, run.ref("prepare")
        for info in read_manifest(store, ref).shards:
            ids = read_shard(store, ref, SAMPLES, info, ["sample_id"])["sample_id"].to_pylist()
            found |= {name for name in ids if not is_held_out(name, fraction)}
    return frozenset(found)
