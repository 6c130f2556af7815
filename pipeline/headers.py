"""What safetensors files say about themselves: their tensors' names, types and shapes, and what is beside them."""

import json
from pathlib import Path


def metadata_of(data: bytes) -> dict[str, str]:
    """The metadata in the header of a safetensors file's bytes.

    Raises:
        ValueError: they are no such file's.
    """
    size = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    return metadata


def tensors_of(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The type (in safetensors' spelling) and shape of each tensor of a file, in its order; reads the header alone.

    Raises:
        ValueError: it is no safetensors file, or is shorter than its header says.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        # what a header can be at most, by the format
        if size > 100_000_000:
            raise ValueError(f"{path}: is no safetensors file")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if path.stat().st_size != 8 + size + end:
        raise ValueError(f"{path}: is cut off")
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
