"""``decant report``: a run's page at any stage of it, a sweep's page, and what is refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.test_cli import decant, refused
from tests.pipeline.reports import bench, sweep
from tests.pipeline.test_report import Read


def test_run_of_which_nothing_is_finished_names_the_command(run_file: Path) -> None:
    refused(decant("report", str(run_file)), "ArtifactMissing", "prepare/tiny@1", "decant prepare RUN.yaml")


def test_report_of_a_begun_run_shows_what_is_finished_its_plan_and_the_bench(
    run_file: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    assert decant("prepare", str(run_file)).exit_code == 0
    (tmp_path / "bench.json").write_text(json.dumps(bench()))
    done = decant("report", str(run_file), "--bench", str(tmp_path / "bench.json"))
    assert done.exit_code == 0, done.output
    page, store = Path(settings["store"]) / "report.html", Path(settings["store"])
    assert f"report: {page}" in done.output
    read = Read(page.read_text())
    assert read.anchors == ["economics", "speed", "provenance"]
    assert "cache, distill, evaluate, export" in read.text
    record = json.loads((store / "prepare/tiny@1/record.json").read_text())
    report = json.loads((store / "report.json").read_text())
    assert report["stages"]["prepare"]["history"] == record["provenance"]["history"]
    assert {record["provenance"]["seconds"], report["planned"]["cache"]["bytes"]} <= read.values
    assert report["bench"] == bench()


def test_report_of_equal_artifacts_is_of_equal_bytes_wherever_it_goes(run_file: Path, tmp_path: Path) -> None:
    assert decant("prepare", str(run_file)).exit_code == 0
    pages = [tmp_path / "a.html", tmp_path / "deep" / "b.html"]
    for page in pages:
        done = decant("report", str(run_file), "--out", str(page))
        assert done.exit_code == 0, done.output
    assert pages[0].read_bytes() == pages[1].read_bytes()
    assert pages[0].with_suffix(".json").read_bytes() == pages[1].with_suffix(".json").read_bytes()


def test_report_needs_no_teacher_once_stages_are_done(run_file: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    assert decant("prepare", str(run_file)).exit_code == 0
    done = decant("report", str(run_file), "--set", f"teacher.path={tmp_path / 'gone'}")
    assert done.exit_code == 0, done.output
    assert "planned" not in json.loads((Path(settings["store"]) / "report.json").read_text())


def test_sweep_table_becomes_a_page_beside_it(tmp_path: Path) -> None:
    table = tmp_path / "ablate" / "losses@1" / "table.json"
    table.parent.mkdir(parents=True)
    table.write_text(json.dumps(sweep()))
    done = decant("report", str(table))
    assert done.exit_code == 0, done.output
    assert "KL + layer" in Read((table.parent / "report.html").read_text()).text
    elsewhere = decant("report", os.path.relpath(table), "--out", str(tmp_path / "other.html"))
    assert elsewhere.exit_code == 0, elsewhere.output
    assert (tmp_path / "other.html").read_bytes() == (table.parent / "report.html").read_bytes()


def without(tree: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in tree.items() if k != key}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", ["is no JSON"]),
        ("[1]", ["table.json, which `decant ablate` writes", "has no name, axes, figures, trials, arms"]),
        (json.dumps(without(sweep(), "arms")), ["it has no arms"]),
        (json.dumps({**sweep(), "trials": [without(sweep()["trials"][0], "seed")]}), ["trials: entry 0 has no seed"]),
    ],
)
def test_file_that_is_no_table_is_refused(tmp_path: Path, content: str, says: list[str]) -> None:
    (tmp_path / "table.json").write_text(content)
    refused(decant("report", str(tmp_path / "table.json")), "ConfigInvalid", str(tmp_path / "table.json"), *says)
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]


def test_options_that_do_not_go_together_are_refused(run_file: Path, tmp_path: Path) -> None:
    table, other = tmp_path / "table.json", tmp_path / "bench.json"
    refused(decant("report", str(table)), "table.json: cannot be read", "decant ablate")
    table.write_text(json.dumps(sweep()))
    refused(decant("report", str(table), "--set", "name=x"), "are for a run's report")
    refused(decant("report", str(table), "--out", "x.pdf"), "expected a file that ends with .html")
    (tmp_path / "file").write_text("")
    refused(
        decant("report", str(table), "--out", str(tmp_path / "file/x.html")), "StoreUnavailable", "cannot be written"
    )
    refused(decant("report", str(run_file), "--bench", str(other)), "bench.json: cannot be read", "decant bench")
    other.write_text(json.dumps({"points": [{"model": "teacher"}]}))
    refused(decant("report", str(run_file), "--bench", str(other)), "points: entry 0 has no engine, batch, context")
