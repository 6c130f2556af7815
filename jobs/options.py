"""What the commands have in common: where they print, the options of run files, and how errors end them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from schemas.errors import DecantError

if TYPE_CHECKING:
    from schemas.config import RunConfig

out = Console(highlight=False, soft_wrap=True)

RunFile = Annotated[Path, typer.Argument(help="The run file (YAML); see jobs/configs/.", metavar="RUN.yaml")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one setting, e.g. --set student.init=matvlm.", metavar="A.B=C"),
]
On = Annotated[
    str,
    typer.Option(
        "--on",
        help="Where to run: local (a session of this machine), auto (the cluster that this machine is part of), or "
        "http://HEAD:8265 (as a job of that cluster).",
        metavar="ADDRESS",
    ),
]
Code = Annotated[
    Literal["upload", "installed"],
    typer.Option("--code", help="On a cluster: run this very code, or what is installed on its nodes."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would run; write nothing.")]


@contextmanager
def readable_errors() -> Iterator[None]:
    """A user's error ends with its message and exit code 2, not with a traceback."""
    try:
        yield
    except DecantError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]{type(error).__name__}[/]: ", end="")
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None


def load(path: Path, overrides: list[str] | None) -> "RunConfig":
    """The run file with its overrides.

    Raises:
        ConfigInvalid: it is not valid.
    """
    from schemas.runfile import load_run

    return load_run(path, overrides or ())
