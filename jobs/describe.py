"""``decant inspect RUN.yaml ARTIFACT``: one artifact in a terminal, with histograms, and as a picture."""

import statistics
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Shown

from jobs.figures import human_bytes, moment
from pipeline.histograms import Histogram, histograms
from pipeline.inventory import Shards, shards_of
from pipeline.stage import require
from pipeline.store import Store
from schemas.artifacts import ArtifactRecord, ArtifactRef
from schemas.errors import StoreUnavailable
from schemas.tables import VISION, Table, recorded_table

# A bar's last cell is filled in eighths.
EIGHTHS = " ▏▎▍▌▋▊▉"
# Cells of the longest bar: longer ones tell no more.
LONGEST_BAR = 60


def describe(store: Store, ref: ArtifactRef, out: Console, picture: Path | None) -> None:
    """Prints one finished artifact: what identifies it, its columns or files, and histograms of its rows.

    Raises:
        ArtifactMissing: it is not there or unfinished.
        ShardCorrupt: record, manifest or a shard cannot be read.
        StoreUnavailable: the picture cannot be written.
    """
    record = require(store, ref)
    table = recorded_table(record)
    out.print(f"[bold]{ref}[/]" + (f": table {table.name}, version {table.version}" if table else ""))
    _record(record, out)
    if table is None:
        _files(store.sizes(str(ref)), out)
        return
    shards = shards_of(store, ref, table)
    _columns(table, shards, out)
    _facts(record, shards, out)
    drawn = histograms(store, ref, table, shards.read)
    for shown in drawn:
        _bars(shown, out)
    if picture:
        _save(picture, f"{ref}, {_of(shards)}", drawn)
        out.print(f"picture: [bold]{picture}[/]")


def _record(record: ArtifactRecord, out: Console) -> None:
    made, versions = record.provenance, record.provenance["versions"]
    out.print(f"fingerprint {record.fingerprint}", markup=False)
    out.print(f"made {moment(made['started'])} in {made['seconds']:.1f} s on {made['machine']}", markup=False)
    out.print("with " + ", ".join(f"{name} {v}" for name, v in versions.items()), soft_wrap=False, markup=False)
    known = {**record.identity, "result": record.result}
    out.print(yaml.safe_dump(known, sort_keys=False, default_flow_style=None, width=out.width), markup=False)


def _files(files: dict[str, int], out: Console) -> None:
    table = _table("file", "size")
    for name, count in files.items():
        table.add_row(name, human_bytes(count))
    out.print(table, soft_wrap=False)


def _table(*headers: str, right: int = 1) -> Shown:
    """A table whose last ``right`` columns are figures."""
    table = Shown(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for number, header in enumerate(headers):
        figure = number >= len(headers) - right
        table.add_column(header, justify="right" if figure else "left", no_wrap=figure, overflow="fold")
    return table


def _columns(table: Table, shards: Shards, out: Console) -> None:
    shown = _table("column", "type", "meaning", "size", "share", "B/row", right=3)
    total, rows = sum(shards.columns.values()), sum(s.rows for s in shards.all)
    for column in table.columns:
        count = shards.columns[column.name]
        meaning = escape(column.doc) + ("; may be empty" if column.nullable else "")
        share = f"{100 * count / total:.1f} %"
        shown.add_row(column.name, str(column.type), meaning, human_bytes(count), share, f"{count / rows:,.1f}")
    out.print(shown, soft_wrap=False)


def _facts(record: ArtifactRecord, shards: Shards, out: Console) -> None:
    sizes, rows = [s.bytes for s in shards.all], sum(s.rows for s in shards.all)
    out.print(
        f"\n{rows:,} rows in {len(sizes)} shards of {human_bytes(min(sizes))} to {human_bytes(max(sizes))}, "
        f"median {human_bytes(statistics.median(sizes))}; {human_bytes(sum(sizes))} in all"
    )
    responses = record.result.get("response_tokens")
    if record.ref.startswith("cache/") and responses:
        taps = sum(count for name, count in shards.columns.items() if name.startswith("tap_"))
        rest = sum(shards.columns.values()) - taps - shards.columns.get(VISION, 0)
        out.print(
            f"{rest / responses:,.1f} B of targets and {taps / responses:,.1f} B of taps for each of "
            f"{responses:,} response tokens"
        )
    out.print(f"histograms and columns' sizes of {_of(shards)}")


def _of(shards: Shards) -> str:
    if len(shards.read) == len(shards.all):
        return f"all {len(shards.all)} shards"
    return f"{len(shards.read)} of {len(shards.all)} shards, evenly spread"


def _bars(shown: Histogram, out: Console) -> None:
    """A histogram as bars of block characters, as wide as the terminal allows."""
    out.print(
        f"\n[bold]{shown.title}[/]: {shown.total:,} values from {shown.smallest:.3g} to {shown.largest:.3g}, "
        f"median {shown.median:.3g}"
    )
    names = _bins(shown)
    counts = [f"{count:,}" for count in shown.counts]
    label, figure = max(map(len, names)), max(map(len, counts))
    room = min(out.width - label - figure - 4, LONGEST_BAR)
    for name, count, text in zip(names, shown.counts, counts, strict=True):
        line = f"{name:>{label}} {_bar(count / max(shown.counts), room)} {text}"
        out.print(line, markup=False)


def _bins(shown: Histogram) -> list[str]:
    pairs = zip(shown.edges, shown.edges[1:], strict=False)
    if not shown.whole:
        return [f"{low:g} … {high:g}" for low, high in pairs]
    return [f"{low:g}" if high - low == 1 else f"{low:g}–{high - 1:g}" for low, high in pairs]


def _bar(share: float, room: int) -> str:
    """A bar of ``share`` of the room; anything above 0 is seen."""
    eighths = max(round(share * room * 8), 1 if share else 0)
    return ("█" * (eighths // 8) + EIGHTHS[eighths % 8]).rstrip()


def _save(picture: Path, title: str, drawn: list[Histogram]) -> None:
    from pipeline.report.charts import histogram_chart

    kind: Any = picture.suffix[1:]
    try:
        picture.write_bytes(histogram_chart(title, drawn, kind))
    except OSError as error:
        raise StoreUnavailable(f"--picture {picture}: cannot be written: {error.strerror or error}") from None
