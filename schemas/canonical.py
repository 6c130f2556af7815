"""One spelling for a value: canonical JSON, its digest, and the field-level difference of two values."""

import hashlib
import json
from typing import Any


def canonical_json(value: Any) -> bytes:
    """The value as JSON with sorted keys and no blanks; equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON, 32 hexadecimal digits (128 bits: no collision in any run's lifetime)."""
    return hashlib.sha256(canonical_json(value)).hexdigest()[:32]


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Every leaf in which two JSON values differ, as ``a.b: old -> new``."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            below = f"{path}.{key}" if path else key
            found += differences(old.get(key, "(absent)"), new.get(key, "(absent)"), below)
        return found
    return [] if old == new else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]
