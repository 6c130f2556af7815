"""The page of a run: it has every figure, needs nothing else, and shows what is there, whatever that is."""

import copy
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import pipeline.report.build
from pipeline.report.build import ReportSource, collect, page
from pipeline.report.sweep import sweep_page
from pipeline.report.tasks import is_probe, parsed
from pipeline.stage import record_bytes
from pipeline.store import Store
from schemas.artifacts import ArtifactRecord, ArtifactRef
from schemas.errors import ArtifactMissing
from tests.pipeline.reports import WHO, full_run, sweep

TEMPLATE = Path(pipeline.report.build.__file__).with_name("report.html.j2")
# What a section needs of a report, by the section's anchor.
NEEDS = {
    "distribution": "distribution",
    "training": "curve",
    "speed": "bench",
    "provenance": "stages",
}


class Read(HTMLParser):
    """The figures, section anchors, tags and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.values, self.anchors, self.tags, self.words = set[float](), list[str](), set[str](), list[str]()
        self.styled = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.tags.add(tag)
        self.styled = tag == "style"
        if tag == "data":
            self.values.add(float(given["value"] or "nan"))
        if tag == "section":
            self.anchors.append(given["id"] or "")

    def handle_data(self, data: str) -> None:
        if not self.styled:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def figures(tree: Any) -> Iterator[float]:
    """Every number in the values of a tree of JSON, without flags."""
    if isinstance(tree, dict):
        yield from (f for value in tree.values() for f in figures(value))
    elif isinstance(tree, list):
        yield from (f for value in tree for f in figures(value))
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield float(tree)


def test_page_has_every_figure_that_the_report_has() -> None:
    report = full_run()
    found = Read(page(report)).values
    for who in WHO:
        for estimates in (report[who]["exact_match"], *report[who]["tasks"].values()):
            for name, estimate in estimates.items():
                assert {estimate["value"], float(estimate["n"])} <= found, (who, name)
    for task, recoveries in report["recoveries"].items():
        assert {r["value"] for r in recoveries.values()} <= found, task
    points = [{k: v for k, v in p.items() if v is not None} for p in report["bench"]["points"]]
    last = {entry["phase"]: entry for entry in report["curve"]}.values()
    shown = {"loss", "kl", "held_out_kl", "held_out_top1", "tokens_per_second", "padding_share", "memory_bytes"}
    shown |= {f"layer_{i}" for i in range(4)}
    parts = {
        "distribution": [v for k, v in report["distribution"].items() if k not in ("kl", "top1_agreement", "bins")],
        "means": [report["distribution"][k]["value"] for k in ("kl", "top1_agreement")],
        "bins": [b for b in report["distribution"]["bins"] if b["share"]],
        "cache": {k: v for k, v in report["cache"].items() if k.endswith(("_bytes", "bytes", "response_token"))
                  and not k.startswith("full")},
        "plan": [[s["bytes"], s["pass_seconds"], s["dollars_per_month"]] for s in report["planned"]["signals"]],
        "points": points,
        "stages": [[s["seconds"], s["started"]] for s in report["stages"].values()],
        "curve": [{k: v for k, v in e.items() if k in shown} for e in last if e["kind"] == "distill"],
    }  # fmt: skip
    for part, tree in parts.items():
        wanted = set(figures(tree))
        assert wanted
        assert wanted <= found, (part, sorted(wanted - found)[:5])


def test_page_tells_lost_workers_fingerprints_versions_and_failed_points() -> None:
    report = full_run()
    text = Read(page(report)).text
    for stage in report["stages"].values():
        assert stage["artifact"] in text
        assert stage["fingerprint"][:12] in text
    for said in (
        "OutOfMemoryError: killed",
        "shard-000003.parquet",
        "node-1, node-2",
        "2.13.0",
        "out of memory",
        "draws do not tell",
        "sdpa",
        "0, 4",
        "150 GB",
    ):
        assert said in text
    assert "Answered but not scored here, as the labels are not public: mm-vet." in text


@pytest.mark.parametrize("made", [lambda: page(full_run()), lambda: sweep_page(sweep()).html()], ids=["run", "sweep"])
def test_page_needs_no_network_no_file_and_no_script(made: Any) -> None:
    text = made()
    read = Read(text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & read.tags
    references = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"')\s>]+)", text)
    assert references
    assert all(reference.startswith("#") for reference in references)
    assert {reference[1:] for reference in references} <= set(re.findall(r' id="([^"]+)"', text))
    assert "@import" not in text
    assert made() == text, "equal figures give equal bytes"
    assert page(json.loads(json.dumps(full_run()))) == page(full_run())


def test_what_is_not_in_the_report_is_absent_and_the_rest_stays() -> None:
    whole = Read(page(full_run()))
    assert whole.anchors == [
        "match", "benchmarks", "probes", "distribution", "training", "economics", "speed", "provenance",
    ]  # fmt: skip
    for anchor, key in NEEDS.items():
        report = full_run()
        report[key] = {} if key == "stages" else None
        assert Read(page(report)).anchors == [a for a in whole.anchors if a != anchor]
    report = full_run()
    for who in WHO:
        del report[who]["tasks"]
    assert not {"benchmarks", "probes"} & set(Read(page(report)).anchors)
    least = {
        "run": {"name": "new", "teacher": "t"},
        "stages": {"prepare": full_run()["stages"]["prepare"]},
        "curve": [],
    }
    read = Read(page({**least, "unfinished": ["cache", "distill"]}))
    assert read.anchors == ["economics", "provenance"]
    assert "no student has been trained yet" in read.text
    assert "Not finished, and so not in this report: cache, distill." in read.text


def test_figures_that_could_not_be_computed_are_a_dash_and_break_nothing() -> None:
    report = full_run()
    report["recovery"] = None
    report["recoveries"]["pope"] = {figure: {"value": None, "ci95": None} for figure in report["recoveries"]["pope"]}
    report["student"]["tasks"]["gqa"]["exact match"] |= {"value": None, "ci95": None}
    report["distribution"] |= {"ece": None, "layers": {}, "bins": []}
    report["planned"]["signals"][0]["break_even_passes"] = float("inf")
    del report["student_untrained"], report["stages"]["prepare"]["history"]
    read = Read(page(report))
    assert "of the teacher's exact match" not in read.text
    assert "–" in read.text
    assert not {"nan", "inf", "None"} & set(re.findall(r"[A-Za-z]+", read.text))
    assert "untrained" not in read.text


def test_radar_stands_for_three_benchmarks_and_more() -> None:
    report, title = full_run(), "each axis from 0"
    assert title in page(report)
    for who in WHO:
        report[who]["tasks"] = {name: report[who]["tasks"][name] for name in ("mme", "pope", "mqar")}
    read = Read(page(report))
    assert title not in read.text
    assert "benchmarks" in read.anchors
    for who in WHO:
        report[who]["tasks"] = {"pope": {"f1": report[who]["tasks"]["pope"]["f1"]}}
    assert "probes" not in Read(page(report)).anchors


@pytest.mark.parametrize("layers", [1, 30])
def test_drawings_are_well_formed_and_draw_only_numbers(layers: int) -> None:
    drawings = re.findall(r"<svg .*?</svg>", page(full_run(layers)))
    assert len(drawings) > 20
    for drawing in drawings:
        for element in ElementTree.fromstring(drawing).iter():
            for name in {"x", "y", "x1", "y1", "x2", "y2", "width", "height", "cx", "cy", "r"} & set(element.keys()):
                assert abs(float(element.attrib[name])) < 5000
            assert "nan" not in element.get("points", "")
    labelled = [d for d in drawings if 'role="img"' in d]
    assert len(set(re.findall(r'aria-label="([^"]+)"', " ".join(labelled)))) == len(labelled)


def test_names_are_text_and_not_markup_however_long() -> None:
    report, name = full_run(), '<b onclick="x">&' + "long " * 40 + "unbroken" * 30
    report["run"]["name"] = name
    for who in WHO:
        report[who]["exact_match"][name] = report[who]["exact_match"]["sum"]
        report[who]["tasks"][name] = {name: report[who]["exact_match"]["sum"]}
    text = page(report)
    assert "b" not in Read(text).tags
    assert name in "".join(Read(text).words)
    for drawing in re.findall(r"<svg .*?</svg>", text):
        ElementTree.fromstring(drawing)


def test_probe_figures_are_read_with_their_length_and_depth() -> None:
    assert parsed("exact_match@512") == ("exact_match", 512, None)
    assert parsed("exact_match@4096/0%") == ("exact_match", 4096, 0.0)
    assert parsed("exact_match@512/75%") == ("exact_match", 512, 0.75)
    assert parsed("accuracy 1024, depth 25 %") == ("accuracy", 1024, 0.25)
    assert parsed("length 2048") == ("accuracy", 2048, None)
    assert parsed("format 64") == ("format", 64, None)
    assert parsed("exact_match") is None
    assert parsed("top1 accuracy") is None
    assert is_probe("needle", ["exact_match"])
    assert is_probe("anything", ["a@64", "a@128"])
    assert not is_probe("mme", ["perception", "cognition", "accuracy 2000"])


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_and_lines_stand_out_from_the_ground(scheme: int) -> None:
    block = re.findall(r":root \{(.*?)\}", TEMPLATE.read_text(), re.DOTALL)[scheme]
    colours = dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{6})", block))
    assert {"bg", "ink", "muted", "card", "link", "teacher", "student", "untrained"} < set(colours)
    for name, colour in colours.items():
        for ground in (colours["bg"], colours["card"]):
            light, dark = sorted((luminance(colour), luminance(ground)), reverse=True)
            contrast = (light + 0.05) / (dark + 0.05)
            # text by WCAG 1.4.3, lines of a drawing by 1.4.11; the grid is no more than a help
            needed = 4.5 if name in ("ink", "muted", "link") else 1.0 if name in ("bg", "card", "line") else 3.0
            assert contrast >= needed, (name, contrast)


def kept(store: Store, report: dict[str, Any]) -> dict[str, ArtifactRef]:
    """The records and the log of which the report would be collected."""
    result = {
        "cache": without(report["cache"], "full_logits_bytes_per_response_token", "vocabulary"),
        "distill": {"replaced": report["run"]["replaced_layers"]},
        "evaluate": {key: report[key] for key in (*WHO, "recovery", "recoveries", "distribution")},
    }
    student = {"layers": report["run"]["decoder_layers"], "init": report["run"]["init"]}
    config = {"name": report["run"]["name"], "teacher": {"path": report["run"]["teacher"]}}
    for name, its in report["stages"].items():
        record = ArtifactRecord(
            ref=its["artifact"],
            fingerprint=its["fingerprint"],
            identity={"settings": {"student": student}},
            result=result.get(name, {}),
            provenance=without(its, "artifact", "fingerprint"),
            config=config,
            files={},
        )
        store.write(f"{its['artifact']}/record.json", record_bytes(record.sealed()))
    store.write("distill/full@1/log.jsonl", "".join(json.dumps(entry) + "\n" for entry in report["curve"]).encode())
    return {name: ArtifactRef.named(name, "full@1") for name in report["stages"]}


def without(tree: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key not in keys}


def test_report_is_collected_from_the_records_and_the_log_alone(tmp_path: Path) -> None:
    report, store = full_run(), Store(str(tmp_path))
    refs, given = kept(store, report), {"planned": report["planned"], "bench": report["bench"]}
    found = collect(store, ReportSource(refs, "distill/full@1/log.jsonl", 81, **given))
    assert found == report
    store.remove("evaluate/full@1/record.json")
    fewer = collect(store, ReportSource(refs, "distill/full@1/log.jsonl"))
    assert set(fewer) == set(report) - {*WHO, "recovery", "recoveries", "distribution", "planned", "bench"}
    assert fewer["unfinished"] == ["evaluate"]
    assert "full_logits_bytes_per_response_token" not in fewer["cache"]
    for name in refs:
        store.remove(f"{name}/full@1")
    with pytest.raises(ArtifactMissing, match="decant prepare"):
        collect(store, ReportSource(refs, "distill/full@1/log.jsonl"))


def test_report_is_not_changed_by_drawing_it() -> None:
    report = full_run()
    before = copy.deepcopy(report)
    page(report)
    assert report == before
