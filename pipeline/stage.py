"""One way to run every stage: inputs finished? done already? drift? then run, and write the record last."""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Literal

import pydantic

from pipeline import journal
from pipeline.journal import Journal
from pipeline.shards import file_digest
from pipeline.store import Store
from schemas.artifacts import RECORD, ArtifactRecord, ArtifactRef
from schemas.canonical import canonical_json, differences, digest
from schemas.errors import ArtifactDrift, ArtifactMissing, ShardCorrupt
from schemas.manifest import is_shard

Status = Literal["done", "partial", "new"]
VERSIONED = ("torch", "transformers", "ray", "deepspeed", "pyarrow", "numpy")


@dataclass(frozen=True)
class Stage:
    """One stage of one run.

    ``settings`` is its identity without the inputs; ``run`` gets the store, the fingerprint and the command's journal,
    does only what is missing on disk, and returns the record's ``result``. ``config`` is the resolved run, recorded but
    no identity.
    """

    ref: ArtifactRef
    inputs: tuple[ArtifactRef, ...]
    settings: dict[str, Any]
    run: Callable[[Store, str, Journal], dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)


def read_record(store: Store, ref: ArtifactRef) -> ArtifactRecord | None:
    """The artifact's record, or None while it is unfinished."""
    if not store.exists(ref.record_path):
        return None
    where = store.path(ref.record_path)
    try:
        record = ArtifactRecord.model_validate_json(store.read(ref.record_path))
    except pydantic.ValidationError as error:
        raise ShardCorrupt(f"{where}: is not a record: {error}") from None
    if record.seal != record.sealed().seal:
        raise ShardCorrupt(f"{where}: was altered after it was written; remove it and run `decant {ref.kind} RUN.yaml`")
    return record


def require(store: Store, ref: ArtifactRef) -> ArtifactRecord:
    """The finished artifact's record.

    Raises:
        ArtifactMissing: it has not been made; the message names the command.
    """
    record = read_record(store, ref)
    if record is None:
        state = "is unfinished" if store.exists(ref.identity_path) else "does not exist"
        raise ArtifactMissing(f"{store.path(str(ref))}: {state}; run `decant {ref.kind} RUN.yaml` first")
    return record


def identify(store: Store, stage: Stage) -> tuple[dict[str, Any], str]:
    """Identity (settings and inputs' fingerprints, as JSON values) and fingerprint of what the stage would make."""
    inputs = {str(ref): require(store, ref).fingerprint for ref in stage.inputs}
    identity = json.loads(canonical_json({"settings": stage.settings, "inputs": inputs}))
    return identity, digest(identity)


def status(store: Store, stage: Stage) -> Status:
    """What is on disk of the stage's artifact.

    Raises:
        ArtifactMissing: an input is unfinished.
        ArtifactDrift: the artifact, finished or begun, was made from other settings.
    """
    identity, fingerprint = identify(store, stage)
    record = read_record(store, stage.ref)
    if record is not None:
        _refuse_drift(store, stage.ref, record.identity, identity)
        assert record.fingerprint == fingerprint, "equal identities have equal fingerprints"
        return "done"
    if store.exists(stage.ref.identity_path):
        _refuse_drift(store, stage.ref, json.loads(store.read(stage.ref.identity_path)), identity)
        return "partial"
    return "new"


def run_stage(store: Store, stage: Stage, job: str | None = None) -> tuple[ArtifactRecord, bool]:
    """Runs the stage unless it is done; returns its record and whether anything was run.

    ``job`` is what Ray calls this process where it was submitted.
    """
    before = status(store, stage)
    if before == "done":
        journal.clear(store, stage.ref)  # there is one where a command died between its record and its end
        return require(store, stage.ref), False
    identity, fingerprint = identify(store, stage)
    if before == "new":
        store.write(stage.ref.identity_path, canonical_json(identity))
    started, kept = time.time(), journal.begin(store, stage.ref, job)
    with kept.kept():
        result = stage.run(store, fingerprint, kept)
        times = {"started": round(started, 3), "seconds": round(time.time() - started, 3)}
        record = ArtifactRecord(
            ref=str(stage.ref),
            fingerprint=fingerprint,
            identity=identity,
            result=result,
            provenance={**provenance(), **times, "history": journal.history(store, stage.ref, kept)},
            config=stage.config,
            files=file_digests(store, stage.ref),
        ).sealed()
        store.write(stage.ref.record_path, record_bytes(record))
    journal.clear(store, stage.ref)
    return record, True


def record_bytes(record: ArtifactRecord) -> bytes:
    """The record as it is written."""
    return (record.model_dump_json(indent=1) + "\n").encode()


def file_digests(store: Store, ref: ArtifactRef) -> dict[str, str]:
    """SHA-256, 32 hexadecimal digits, of the artifact's files beside record and shards."""
    names = [n for n in store.names(str(ref)) if n != RECORD and not is_shard(n) and store.is_file(f"{ref}/{n}")]
    return {name: file_digest(store, f"{ref}/{name}") for name in names}


def provenance() -> dict[str, Any]:
    """Versions and hardware of this process."""
    versions = {}
    for name in VERSIONED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "machine": platform.machine(), "versions": versions}


def _refuse_drift(store: Store, ref: ArtifactRef, old: dict[str, Any], new: dict[str, Any]) -> None:
    found = differences(old, new)
    if found:
        raise ArtifactDrift(
            f"{store.path(str(ref))}: was made from other settings:\n  "
            + "\n  ".join(found)
            + f"\ngive this run another `{ref.kind}.artifact` (for example {ref.name}@{ref.version + 1}), "
            "or remove that folder to make it anew"
        )
