"""The artifact store: a folder on local disk or object storage, reached through fsspec.

Owns atomic commits. On local disk an object is written under a temporary name, synced and renamed; elsewhere it is one
PUT, which object stores make visible as a whole. No reader ever sees half an object.
"""

import os
import uuid
from pathlib import Path
from typing import cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from schemas.errors import StoreUnavailable


class Store:
    """Objects under one root (path or URL), addressed by relative paths with forward slashes."""

    def __init__(self, root: str) -> None:
        self.fs, self.root = fsspec.core.url_to_fs(root)
        self.url = root

    @property
    def local(self) -> bool:
        """Whether the objects are files of this machine."""
        return isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """The object's path within the file system."""
        return f"{self.root.rstrip('/')}/{name}"

    def exists(self, name: str) -> bool:
        """Whether the object has been committed."""
        return cast(bool, self.fs.exists(self.path(name)))

    def read(self, name: str) -> bytes:
        """The object's bytes."""
        try:
            return cast(bytes, self.fs.cat_file(self.path(name)))
        except OSError as error:
            raise StoreUnavailable(f"{self.path(name)}: cannot be read: {error}") from None

    def size(self, name: str) -> int:
        """The object's size in bytes."""
        return cast(int, self.fs.size(self.path(name)))

    def names(self, folder: str) -> list[str]:
        """Names of the committed objects directly in a folder, sorted; empty where there is no folder."""
        try:
            found = self.fs.ls(self.path(folder), detail=False, refresh=True)
        except FileNotFoundError:
            return []
        return sorted(name for name in (p.rsplit("/", 1)[-1] for p in found) if not name.startswith(".tmp-"))

    def remove(self, name: str) -> None:
        """Removes an object or a whole folder, if it is there."""
        if self.fs.exists(self.path(name)):
            self.fs.rm(self.path(name), recursive=True)

    def write(self, name: str, data: bytes) -> None:
        """Commits the object as a whole, in place of any earlier one.

        Raises:
            StoreUnavailable: the folder cannot be written.
        """
        target = self.path(name)
        try:
            if self.local:
                _write_local(Path(target), data)
            else:
                self.fs.pipe_file(target, data)
        except OSError as error:
            raise StoreUnavailable(
                f"{target}: cannot be written: {error.strerror or error}; check that `store` ({self.url}) is writable"
            ) from None


def _write_local(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".tmp-{uuid.uuid4().hex}"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
