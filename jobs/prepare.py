"""Stage ``prepare``: conversations in the LLaVA format to the ``samples`` table."""

from typing import Any

from jobs.progress import Progress
from jobs.stages import file_digest, resolved
from pipeline.data.encoding import Encoder
from pipeline.data.samples import prepare
from pipeline.folders import processor_digests
from pipeline.models import load_processor
from pipeline.stage import Stage
from pipeline.store import Store
from schemas.config import RunConfig
from schemas.errors import SampleInvalid
from schemas.tables import SAMPLES


def stage(run: RunConfig) -> Stage:
    """The stage of this run. Identity: data file, the teacher's processor, sharding, maximum length, table."""
    config = run.prepare
    settings = {
        "data": file_digest(config.data),
        "processor": processor_digests(run.teacher.path),
        "shard_rows": config.shard_rows,
        "max_length": config.max_length,
        "on_bad_sample": config.on_bad_sample,
        "table": str(SAMPLES),
    }

    def work(store: Store, fingerprint: str) -> dict[str, Any]:
        encoder = Encoder(load_processor(run.teacher.path), config.max_length)
        try:
            with Progress("prepare", None, "samples") as progress:
                return prepare(store, run.ref("prepare"), config, encoder, fingerprint, progress.update)
        except SampleInvalid:
            # the user will mend the data, which is then other data: what was begun from the old is of no use
            store.remove(str(run.ref("prepare")))
            raise

    return Stage(run.ref("prepare"), (), settings, work, resolved(run))
