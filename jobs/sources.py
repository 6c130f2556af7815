"""The caches that a student is trained from: the run's own, and other teachers', which must fit it row by row."""

from jobs.stages import open_store, tapped_layers, teacher_digests
from pipeline.folders import other_vocabulary
from pipeline.stage import read_record, require
from pipeline.store import Store
from pipeline.training.sources import Source
from schemas.artifacts import ArtifactRef
from schemas.config import CacheConfig, RunConfig
from schemas.errors import ArtifactDrift, ArtifactMissing, ConfigInvalid
from schemas.tables import recorded_cache, targets_table


def sources_of(run: RunConfig) -> tuple[Source, ...]:
    """The run's own cache and then those of ``distill.teachers``, with shares that sum to 1.

    Raises:
        ArtifactMissing: another teacher's cache, or the samples that it should be of, are unfinished.
        ArtifactDrift: it was made from other samples.
        ConfigInvalid: its teacher's tokenizer, its positions or its kind of target do not fit this run.
    """
    whole = run.distill.own_weight + sum(teacher.weight for teacher in run.distill.teachers)
    table = targets_table(run.cache, tapped_layers(run))
    found = [Source(run.ref("cache"), run.cache, table, run.distill.own_weight / whole)]
    for number, teacher in enumerate(run.distill.teachers):
        ref, field = ArtifactRef.named("cache", teacher.cache), f"distill.teachers.{number}.cache"
        if ref == run.ref("cache"):
            raise ConfigInvalid(f"{field}: {teacher.cache} is the run's own cache; distill.own_weight is its weight")
        cache, tapped = _settings(open_store(run), run, ref, field)
        found.append(Source(ref, cache, targets_table(cache, tapped), teacher.weight / whole))
    return tuple(found)


def _settings(store: Store, run: RunConfig, ref: ArtifactRef, field: str) -> tuple[CacheConfig, tuple[int, ...]]:
    """Settings and tapped layers of another teacher's cache whose targets can stand beside the run's own."""
    where = f"{field}: {store.path(str(ref))}"
    record = read_record(store, ref)
    if record is None:
        state = "is unfinished" if store.exists(ref.identity_path) else "does not exist"
        raise ArtifactMissing(f"{where}: {state}; run `decant cache` with the run file of its teacher first")
    samples = require(store, run.ref("prepare"))
    if samples.fingerprint not in record.identity["inputs"].values():
        raise ArtifactDrift(
            f"{where}: was made from other samples ({', '.join(record.identity['inputs'])}) than this run's "
            f"({samples.ref}, fingerprint {samples.fingerprint[:8]}); cache that teacher under another name with "
            f"`--set prepare.artifact={samples.ref.partition('/')[2]}`"
        )
    if files := other_vocabulary(teacher_digests(run.teacher), record.identity["settings"]["teacher"]):
        raise ConfigInvalid(
            f"{where}: its teacher has another tokenizer than {run.teacher.path} ({', '.join(files)} differ), so that "
            "ids are other tokens; mix caches of teachers with one tokenizer"
        )
    cache, tapped = recorded_cache(record)
    _check_targets(cache, run, where)
    return cache, tapped


def _check_targets(cache: CacheConfig, run: RunConfig, where: str) -> None:
    if cache.positions != run.cache.positions:
        raise ConfigInvalid(
            f"{where}: has targets at `{cache.positions}` positions, this run's own cache at "
            f"`{run.cache.positions}`; cache one of them again with the cache.positions of the other"
        )
    if cache.targets.kind == "final_hidden":
        raise ConfigInvalid(
            f"{where}: holds `final_hidden` targets, which need the head of their own teacher; cache that teacher with "
            "cache.targets.kind `sampled` or `top_k`"
        )
