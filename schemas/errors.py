"""The tree of errors that a user can meet, named by the moment in which they happen.

Every message is complete in itself (what, where, expected, got, what to do next), because Ray hands a worker's
exception to the driver as text and strips its type.
"""

import reprlib
from typing import Any

# Characters of a value in a message: enough to find it by, and the message stays a line or two.
LONGEST = 80


class _Brief(reprlib.Repr):
    """Looks at the beginnings of values only, however long or deep they are."""

    def repr_bytes(self, value: bytes, _: int) -> str:
        return f"<{len(value)} bytes>"


def shown(value: Any) -> str:
    """A value of the user's as it stands in a message: cut to 80 characters, and whatever it is, printable.

    Text stands for itself, anything else as Python would write it.
    """
    text = value if isinstance(value, str) and value[: LONGEST + 1].isprintable() else _Brief().repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


class DecantError(ValueError):
    """Anything that the user can put right; the command line prints it without a traceback."""


class ConfigInvalid(DecantError):
    """The run file or a ``--set`` override does not describe a run."""


class SampleInvalid(DecantError):
    """A record of the user's data cannot be used; names file, record and field."""


class ArtifactMissing(DecantError):
    """A stage's input has not been made yet; names the command that makes it."""


class ArtifactDrift(DecantError):
    """What is on disk was made from other settings; lists the fields that differ."""


class ShardCorrupt(DecantError):
    """A shard's bytes are not what its footer says."""


class StoreUnavailable(DecantError):
    """The artifact store cannot be read or written."""


class ClusterLost(DecantError):
    """The Ray session did not start, or ended before its stage did."""


class ClusterUnavailable(DecantError):
    """A running cluster cannot be reached, refuses us, or runs another Ray."""


class BackendUnavailable(DecantError):
    """A backend was asked for by name and cannot be used here; says why and how to install it."""


class TrainingDiverged(DecantError):
    """A loss or gradient is not a number any more; names the step and the samples."""


class TeacherLost(DecantError):
    """A process of a teacher that is split over several ended before its time; says how."""


class WorkersLost(DecantError):
    """Workers end again and again over the same work; names it, the hosts, and what to lower."""


class MemoryExhausted(DecantError):
    """A worker's device has too little memory; names the settings to lower."""
