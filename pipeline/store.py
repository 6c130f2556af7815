"""The artifact store: a folder on local disk or object storage, reached through fsspec.

Owns atomic commits. On local disk an object is written under a temporary name, synced and renamed; elsewhere it is one
PUT, which object stores make visible as a whole. No reader ever sees half an object. Elsewhere than on local disk,
whatever may pass (server errors, timeouts, broken connections, bodies cut short) is tried again for about a minute.
"""

import io
import os
import random
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from schemas.config import StoreConfig
from schemas.errors import StoreUnavailable

T = TypeVar("T")
# Waits of 1, 2, 4, 8 and 16 seconds, each halved at random so that many workers do not come back at once.
ATTEMPTS, FIRST_WAIT = 6, 1.0
# No second attempt changes these.
LASTING = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
# Libraries below the file systems whose errors are not OSErrors.
TRANSPORTS = ("aiohttp", "botocore", "fsspec", "s3fs", "urllib3")
# What file systems call the time of an object's last change.
MODIFIED = ("mtime", "LastModified", "last_modified", "updated", "created")


@dataclass(frozen=True)
class Committed:
    """One object of a listing: bytes, and when it was written (seconds since the epoch; 0 where none is told)."""

    size: int
    modified: float


class Store:
    """Objects under one root (path or URL), addressed by relative paths with forward slashes."""

    def __init__(self, where: str | StoreConfig) -> None:
        config = where if isinstance(where, StoreConfig) else StoreConfig(url=where)
        self.fs, self.root = fsspec.core.url_to_fs(config.url, **_connection(config))
        self.url = config.url

    @property
    def local(self) -> bool:
        """Whether the objects are files of this machine."""
        return isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """The object's path within the file system; an absolute one is its own."""
        return name if name.startswith("/") else f"{self.root.rstrip('/')}/{name}"

    def patiently(self, name: str, action: Callable[[], T]) -> T:
        """What the action gives, tried again where its failure may pass.

        Raises:
            StoreUnavailable: it never did; names the object.
        """
        for attempt in range(ATTEMPTS):
            try:
                return action()
            except Exception as error:
                if not _may_pass(error):
                    raise
                if self.local or attempt == ATTEMPTS - 1:
                    times = "" if self.local else f" in {ATTEMPTS} attempts"
                    raise StoreUnavailable(
                        f"{self.path(name)}: no answer from the store{times}: {type(error).__name__}: {error}; "
                        f"check `store` ({self.url}), then run the same command again: it goes on with what is missing"
                    ) from None
                time.sleep(FIRST_WAIT * 2**attempt * random.uniform(0.5, 1.0))
        raise AssertionError("the last attempt returns or raises")

    def _ask(self, name: str, action: Callable[[], T]) -> T:
        """As ``patiently``, of what is the store's own: that it is not allowed is the user's to put right."""
        try:
            return self.patiently(name, action)
        except PermissionError as error:
            raise StoreUnavailable(
                f"{self.path(name)}: not allowed: {error}; check `store` ({self.url}), and its credentials in this "
                "process's environment or the folder's permissions"
            ) from None

    def _info(self, name: str) -> dict[str, Any] | None:
        """What the file system says of an object or folder, None where there is none.

        Asked for by itself, because ``exists`` and ``isfile`` of many file systems take any failure for a no.
        """
        try:
            return cast("dict[str, Any]", self._ask(name, lambda: self.fs.info(self.path(name))))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def exists(self, name: str) -> bool:
        """Whether the object has been committed."""
        return self._info(name) is not None

    def is_file(self, name: str) -> bool:
        """Whether the name is an object's and no folder's."""
        return (self._info(name) or {}).get("type") == "file"

    def read(self, name: str) -> bytes:
        """The object's bytes, all of them."""
        try:
            return self.fetch(name)
        except OSError as error:
            raise StoreUnavailable(f"{self.path(name)}: cannot be read: {error}") from None

    def fetch(self, name: str) -> bytes:
        """As ``read``, for what is the user's own: that it is missing or no file stays an OSError."""

        def whole() -> bytes:
            data, size = cast(bytes, self.fs.cat_file(self.path(name))), self.fs.size(self.path(name))
            if len(data) != size:
                raise EOFError(f"{len(data)} bytes came of {size}")
            return data

        return self.patiently(name, whole)

    def size(self, name: str) -> int:
        """The object's size in bytes."""
        return cast(int, self._ask(name, lambda: self.fs.size(self.path(name))))

    def names(self, folder: str) -> list[str]:
        """Names of the committed objects directly in a folder, sorted; empty where there is no folder."""
        try:
            found = self._ask(folder, lambda: self.fs.ls(self.path(folder), detail=False, refresh=True))
        except FileNotFoundError:
            return []
        return sorted(name for name in (p.rsplit("/", 1)[-1] for p in found) if not name.startswith(".tmp-"))

    def listing(self, folder: str) -> dict[str, Committed]:
        """All committed objects below a folder, by their paths within it, sorted."""
        found = self._ask(folder, lambda: self.fs.find(self.path(folder), detail=True, refresh=True))
        inside = {path.removeprefix(self.path(folder) + "/"): entry for path, entry in found.items()}
        names = sorted(name for name in inside if not name.rsplit("/", 1)[-1].startswith(".tmp-"))
        return {name: Committed(inside[name]["size"], _modified(inside[name])) for name in names}

    def sizes(self, folder: str) -> dict[str, int]:
        """Sizes in bytes of all committed objects below a folder, by their paths within it, sorted."""
        return {name: found.size for name, found in self.listing(folder).items()}

    def remove(self, name: str) -> None:
        """Removes an object or a whole folder, if it is there."""
        # where an answer was lost, the second attempt finds nothing
        with suppress(FileNotFoundError):
            self._ask(name, lambda: self.fs.rm(self.path(name), recursive=True))

    def write(self, name: str, data: bytes) -> None:
        """Commits the object as a whole, in place of any earlier one.

        Raises:
            StoreUnavailable: the folder cannot be written.
        """
        self.write_by(name, lambda file: file.write(data))

    def touch(self, name: str) -> None:
        """Makes an object of no content, whose name is all that it says, or renews its time.

        On local disk it is not synced: a machine that fails may take it along.

        Raises:
            StoreUnavailable: the folder cannot be written.
        """
        target = self.path(name)
        try:
            if self.local:
                Path(target).parent.mkdir(parents=True, exist_ok=True)
                Path(target).touch()
            else:
                self.patiently(name, lambda: self.fs.pipe_file(target, b""))
        except OSError as error:
            raise self._unwritable(target, error) from None

    def write_by(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        """Commits what ``write`` writes; on local disk straight to the file, so that no copy of it is held."""
        target = self.path(name)
        try:
            if self.local:
                _write_local(Path(target), write)
            else:
                buffer = io.BytesIO()
                write(buffer)
                self.patiently(name, lambda: self.fs.pipe_file(target, buffer.getvalue()))
        except OSError as error:
            raise self._unwritable(target, error) from None

    def _unwritable(self, target: str, error: OSError) -> StoreUnavailable:
        return StoreUnavailable(
            f"{target}: cannot be written: {error.strerror or error}; check that `store` ({self.url}) is writable"
        )


def _modified(entry: dict[str, Any]) -> float:
    """When an object of a listing was written."""
    found = next((entry[name] for name in MODIFIED if name in entry), 0.0)
    return found.timestamp() if isinstance(found, datetime) else found if isinstance(found, float) else 0.0


def _connection(config: StoreConfig) -> dict[str, Any]:
    """What s3fs takes; anything not given comes from the environment."""
    # no listings kept: other processes commit objects, and a listing from before would hide them
    given: dict[str, Any] = {
        "use_listings_cache": False,
        "endpoint_url": config.endpoint,
        "profile": config.profile,
    }
    if config.region:
        given["client_kwargs"] = {"region_name": config.region}
    return {name: value for name, value in given.items() if value is not None}


def _may_pass(error: Exception) -> bool:
    """Whether another attempt may succeed where this error came."""
    if isinstance(error, LASTING):
        return False
    return isinstance(error, OSError | EOFError) or type(error).__module__.partition(".")[0] in TRANSPORTS


def _write_local(target: Path, write: Callable[[BinaryIO], object]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".tmp-{uuid.uuid4().hex}"
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
