"""``decant plan``: what it prints, refuses and leaves alone; its probe needs Ray and stands in ``test_path``."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.figures import human_bytes, human_time
from jobs.plan import make_plan, rates_file
from schemas.runfile import load_run
from tests.jobs.test_cli import committed, decant, refused


def test_plan_before_prepare_is_json_and_writes_nothing(run_file: Path, settings: dict[str, Any]) -> None:
    done = decant("plan", str(run_file), "--probe", "0", "--json", "--accelerator", "a100-80gb", "--passes", "3")
    assert done.exit_code == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["accelerator"]["name"], plan["passes_per_month"], plan["measured"]) == ("a100-80gb", 3.0, None)
    assert (plan["data"]["prepared"], plan["data"]["samples"]) == (False, 40)
    own = [s for s in plan["signals"] if s["own"]]
    assert sum(s["bytes"] for s in own) == plan["cache"]["bytes"]
    assert own[0]["bytes_per_response_token"] == own[0]["bytes"] / plan["data"]["response_tokens"]
    assert {s["answer"] for s in plan["signals"]} <= {"cache", "bounded slice", "recompute"}
    assert committed(settings["store"]) == []


def test_table_fits_120_columns_and_says_what_is_assumed(run_file: Path) -> None:
    done = decant("plan", str(run_file), "--probe", "0")
    assert done.exit_code == 0, done.stderr
    assert max(len(line) for line in done.stdout.splitlines()) <= 120
    assert "* sampled, 50 draws" in done.stdout
    assert "…" not in done.stdout
    assert "assumed: distinct ids of 50 draws a position" in done.stdout


def test_unknown_accelerator_is_refused_with_those_that_there_are(run_file: Path) -> None:
    refused(decant("plan", str(run_file), "--accelerator", "h900"), "ConfigInvalid", "h900", "h200, h100, a100-80gb")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"storage": {"dollars_per_gb_monht": 1}}, "storage.dollars_per_gb_monht: unknown field; did you mean"),
        ({"accelerators": {"mine": {"memory_gib": 24}}}, "accelerators.mine.effective: is required"),
        ({"accelerators": {}}, "accelerators: "),
    ],
)
def test_bad_table_of_accelerators_names_the_field(
    run_file: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(rates_file().read_text()), **change}))
    refused(decant("plan", str(run_file), "--accelerators", str(path)), "ConfigInvalid", str(path), says)


def test_missing_files_are_named(run_file: Path, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere.yaml")
    refused(decant("plan", str(run_file), "--accelerators", nowhere), f"{nowhere}: no such table of accelerators")
    data = str(tmp_path / "none.json")
    refused(
        decant("plan", str(run_file), "--probe", "0", "--set", f"prepare.data={data}"), f"{data}: no such data file"
    )


def test_users_table_changes_time_and_money(run_file: Path, tmp_path: Path) -> None:
    table = yaml.safe_load(rates_file().read_text())
    before = make_plan(load_run(run_file), "h100", None, 2.0, 0)
    table["accelerators"]["h100"]["float32_tflops"] *= 2
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(table))
    after = make_plan(load_run(run_file), "h100", path, 2.0, 0)
    for (_, one), (_, other) in zip(before.rows, after.rows, strict=True):
        assert other.pass_seconds == pytest.approx(one.pass_seconds / 2)
        assert other.break_even_passes == pytest.approx(one.break_even_passes * 2)


def test_probe_of_too_few_samples_is_refused(run_file: Path) -> None:
    refused(decant("plan", str(run_file), "--probe", "1"), "--probe: 1 samples are too few", "at least 2")


def test_human_units_round_where_the_unit_changes() -> None:
    assert [human_bytes(size) for size in (0, 999.4, 999.6, 1.5e6, 59.9e12, 2e15)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.5 MB",
        "59.9 TB",
        "2 PB",
    ]
    assert [human_time(seconds) for seconds in (0.1361, 14400)] == ["0.136 s", "4 h"]
