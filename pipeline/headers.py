"""What safetensors files say about themselves beside their tensors."""

import json


def metadata_of(data: bytes) -> dict[str, str]:
    """The metadata in the header of a safetensors file's bytes.

    Raises:
        ValueError: they are no such file's.
    """
    size = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    return metadata
