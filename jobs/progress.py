"""Progress of a long stage: a rich bar in a terminal, plain lines with rate and time left in a log."""

import sys
import time
from functools import partial
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

# Seconds between two lines in a log.
INTERVAL = 10.0


class Progress:
    """Counts one stage's units of work; ``update`` takes how many are done."""

    def __init__(self, title: str, total: int | None, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.started = self.last = time.monotonic()
        self.first: int | None = None
        self.shown: int | None = None
        self.bar: RichProgress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
            rate = TextColumn("{task.fields[rate]}", table_column=Column(no_wrap=True))
            times = (TimeElapsedColumn(), TimeRemainingColumn())
            self.bar = RichProgress(*columns, rate, *times, console=Console(stderr=True))
            self.task = self.bar.add_task(title, total=total, rate="")

    def __enter__(self) -> "Progress":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def say(self, text: str) -> None:
        """Prints a line beside the bar."""
        (self.bar.console.print if self.bar else partial(print, file=sys.stderr, flush=True))(f"{self.title}: {text}")

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        """Shows ``done`` units of work, with a note such as the loss; ``total`` where it was not known before."""
        self.total = self.total if total is None else total
        now = time.monotonic()
        if self.first is None:
            self.first = done  # a resumed stage begins in the middle; its rate must not count what was there
        rate = (done - self.first) / (now - self.started) if done > self.first else 0.0
        if self.bar:
            self.bar.update(self.task, completed=done, total=self.total, rate=f"{rate:.1f} {self.unit}/s {note}")
            return
        ended = done == self.total and done != self.shown
        if now - self.last >= INTERVAL or ended:
            self.last, self.shown = now, done
            of = f"/{self.total}" if self.total else ""
            left = f", {(self.total - done) / rate:.0f} s left" if self.total and rate else ""
            print(
                f"{self.title}: {done}{of} {self.unit}, {rate:.1f}/s{left} {note}".rstrip(), file=sys.stderr, flush=True
            )
