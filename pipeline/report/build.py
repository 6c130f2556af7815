"""The report of a run: figures collected from the finished artifacts, as JSON and as one self-contained HTML page."""

import json
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline.report import charts
from pipeline.stage import require
from pipeline.store import Store
from schemas.artifacts import ArtifactRecord, ArtifactRef

# Bytes of one logit in the 16-bit types in which logits are usually kept.
LOGIT_BYTES = 2


@dataclass(frozen=True)
class ReportSource:
    """Where the figures are: each stage's artifact, and the training curve's object in the store."""

    refs: dict[str, ArtifactRef]
    curve: str
    vocabulary: int


def collect(store: Store, source: ReportSource) -> dict[str, Any]:
    """All figures of the report.

    Raises:
        ArtifactMissing: a stage is unfinished.
    """
    records = {name: require(store, ref) for name, ref in source.refs.items()}
    evaluation, cache = records["evaluate"].result, records["cache"].result
    return {
        "run": {
            "name": records["evaluate"].config["name"],
            "teacher": records["evaluate"].config["teacher"]["path"],
            "replaced_layers": records["distill"].result["replaced"],
            "decoder_layers": records["distill"].identity["settings"]["student"]["layers"],
            "init": records["distill"].identity["settings"]["student"]["init"],
        },
        **{who: evaluation[who] for who in ("teacher", "student_untrained", "student") if who in evaluation},
        "recovery": evaluation["recovery"],
        "cache": {
            **cache,
            "full_logits_bytes_per_response_token": LOGIT_BYTES * source.vocabulary,
            "vocabulary": source.vocabulary,
        },
        "stages": {name: _stage(record) for name, record in records.items()},
        "curve": [json.loads(line) for line in store.read(source.curve).splitlines()],
        "versions": records["distill"].provenance["versions"],
    }


def _stage(record: ArtifactRecord) -> dict[str, Any]:
    return {"seconds": record.provenance["seconds"], "artifact": record.ref, "fingerprint": record.fingerprint}


def page(report: dict[str, Any]) -> str:
    """The report as HTML that needs no other file."""
    whos = [who for who in charts.COLOURS if who in report]
    scores = {who: report[who]["exact_match"] for who in whos}
    layers = sorted({k for e in report["curve"] for k in e if k.startswith("layer_")}, key=lambda k: int(k[6:]))
    cache = report["cache"]
    sizes = {
        "full logits (16 bit)": cache["full_logits_bytes_per_response_token"],
        "sampled targets": cache["bytes_per_response_token"],
    }
    environment = Environment(loader=PackageLoader("pipeline.report", "."), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html.j2").render(
        report=report,
        whos=whos,
        labels=charts.LABELS,
        groups=list(scores["teacher"]),
        match_chart=charts.exact_match_chart(scores),
        kl_chart=charts.curve_chart(report["curve"], ["kl", "ce"], "KL, nats a token"),
        layer_chart=charts.curve_chart(report["curve"], layers, "layer loss, relative"),
        time_chart=charts.bar_chart({k: v["seconds"] for k, v in report["stages"].items()}, "seconds", "s"),
        bytes_chart=charts.bar_chart(sizes, "bytes per response token", "B", log=True),
    )
