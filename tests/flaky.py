"""A store in memory whose operations fail as object storage does: errors, timeouts, answers cut short; by seed."""

import io
import random
from collections.abc import Callable
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class FlakyFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """Fails with the probability ``rate`` before doing anything, or (reads) hands over only half of the bytes."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    rate: ClassVar[float] = 0.0
    chance: ClassVar[random.Random] = random.Random(0)
    failures: ClassVar[list[str]] = []

    @classmethod
    def start(cls, rate: float, seed: int = 0) -> None:
        """An empty store that fails so often."""
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.failures.clear()
        cls.rate, cls.chance = rate, random.Random(seed)

    def _fails(self, name: str) -> bool:
        if self.chance.random() < self.rate:
            self.failures.append(name)
            return True
        return False

    def _maybe(self, name: str, action: Callable[[], Any]) -> Any:
        if self._fails(name):
            raise self.chance.choice([OSError(503, "Service Unavailable"), TimeoutError("timed out")])
        return action()

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        """As in memory, or an error."""
        return self._maybe("ls", lambda: super(FlakyFileSystem, self).ls(path, detail=detail, **kwargs))

    def info(self, path: str, **kwargs: Any) -> Any:
        """As in memory, or an error."""
        return self._maybe("info", lambda: super(FlakyFileSystem, self).info(path, **kwargs))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> Any:
        """As in memory, or an error."""
        return self._maybe("pipe_file", lambda: super(FlakyFileSystem, self).pipe_file(path, value, mode, **kwargs))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> Any:
        """As in memory, an error, or half of the bytes."""
        data = self._maybe("cat_file", lambda: super(FlakyFileSystem, self).cat_file(path, start, end, **kwargs))
        return data[: len(data) // 2] if self._fails("cut") else data

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if "r" not in mode:
            return super()._open(path, mode, **kwargs)
        file = self._maybe("open", lambda: super(FlakyFileSystem, self)._open(path, mode, **kwargs))
        if self._fails("cut open"):
            return io.BytesIO(file.getvalue()[: len(file.getvalue()) // 2])
        return file


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
