"""What identifies a result and what is written beside it."""

import re
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from schemas.canonical import digest

# Written last: an artifact without it is unfinished and no stage reads it.
RECORD = "record.json"
# Written first: what the artifact will be, so that a resumed stage can tell a drift before any work.
IDENTITY = "identity.json"
# Of a training: its curve, one JSON object a line, and the folder of its checkpoints.
LOG, CHECKPOINTS = "log.jsonl", "checkpoints"


@dataclass(frozen=True)
class ArtifactRef:
    """``kind/name@version``, which is also its folder in the store."""

    kind: str
    name: str
    version: int

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}@{self.version}"

    @staticmethod
    def named(kind: str, name: str) -> "ArtifactRef":
        """The artifact ``name@version`` of a kind."""
        stem, _, version = name.partition("@")
        return ArtifactRef(kind, stem, int(version))

    @staticmethod
    def parse(text: str) -> "ArtifactRef | None":
        """The artifact that the text spells, None where it spells none."""
        match = re.fullmatch(r"([a-z-]+)/([A-Za-z0-9._-]+)@([1-9][0-9]*)", text)
        return ArtifactRef(match[1], match[2], int(match[3])) if match else None

    @property
    def record_path(self) -> str:
        """Path of the record within the store."""
        return f"{self}/{RECORD}"

    @property
    def identity_path(self) -> str:
        """Path of the identity within the store."""
        return f"{self}/{IDENTITY}"


class ArtifactRecord(BaseModel):
    """The finished artifact: identity and fingerprint, result, and how it came about.

    ``identity`` holds settings and the inputs' fingerprints; ``fingerprint`` is its digest. ``provenance`` (versions,
    hardware, times) and ``config`` (the resolved run) describe the run and are not part of the identity. ``files`` are
    the SHA-256 of everything beside the record but shards, which the manifest among them has; ``seal`` that of the rest
    of the record.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ref: str
    fingerprint: str
    identity: dict[str, Any]
    result: dict[str, Any]
    provenance: dict[str, Any]
    config: dict[str, Any]
    files: dict[str, str]
    seal: str = ""

    def sealed(self) -> "ArtifactRecord":
        """The record with the seal that its values have."""
        return self.model_copy(update={"seal": digest(self.model_dump(exclude={"seal"}))})
