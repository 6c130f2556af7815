import gc
import io
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PhiConfig

from jobs import contestants
from jobs.bench import Asked, bench, engine_names, whole_numbers, write
from jobs.bench_table import show
from jobs.contestants import chosen, of_folders, of_run
from pipeline import roofline
from pipeline.decoding import timing
from pipeline.decoding.timing import Decoded
from pipeline.meter import BenchSettings, Meter
from pipeline.report.speed import memory_chart, speed_chart
from pipeline.roofline import Footprint, KeptLayer, footprint
from pipeline.student import load_hybrid, save_hybrid
from pipeline.surgery import mixers
from schemas.config import RunConfig
from schemas.errors import ConfigInvalid, MemoryExhausted
from tests.decoders import MULTI_HEAD, build, hybrid
from tests.jobs.test_cli import decant, refused
from tests.students import finish_training, start_student

CPU = torch.device("cpu")
SETTINGS = BenchSettings((8,), (1,), ("decant",), new_tokens=3, repeats=1, dtype="float32")
# Keys that a report reads; see the text of the command.
KEYS = {
    "model",
    "engine",
    "batch",
    "context",
    "new_tokens",
    "seconds_to_first_token",
    "tokens_per_second",
    "peak_bytes",
    "roofline_tokens_per_second",
    "roofline_share",
    "formula_bytes",
    "error",
}


@pytest.fixture(autouse=True)
def _small_work(monkeypatch: pytest.MonkeyPatch, _threads: None) -> None:
    """The bandwidth itself matters nowhere here, and threads would wait for each other longer than they compute."""
    torch.set_num_threads(1)
    monkeypatch.setitem(roofline.COPY_BYTES, "cpu", 2**20)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """A named configuration of four small layers."""
    monkeypatch.setitem(contestants.NAMED, "tiny", lambda: PhiConfig(**MULTI_HEAD))
    return "tiny"


def flat(text: str) -> str:
    return " ".join(text.split())


def test_command_measures_a_runs_teacher_and_student_and_writes_what_a_report_reads(
    run_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "bench"
    options = ["--contexts", "16,8", "--batches", "1,2", "--new-tokens", "5", "--repeats", "2", "--out", str(folder)]
    done = decant("bench", str(run_file), *options)
    assert done.exit_code == 0, done.output
    result = json.loads((folder / "bench.json").read_text())
    assert list(result["models"]) == ["teacher", "student"]
    places = [(p["model"], p["engine"], p["batch"], p["context"]) for p in result["points"]]
    assert sorted(places) == sorted(
        (m, e, b, c) for m in ("teacher", "student") for e in ("decant", "generate") for b in (1, 2) for c in (8, 16)
    )
    for point in result["points"]:
        assert set(point) >= KEYS
        tokens = point["batch"] * (point["new_tokens"] - 1)
        assert point["tokens_per_second"] * point["seconds"] == pytest.approx(tokens, rel=1e-9)
        assert point["roofline_share"] * point["roofline_tokens_per_second"] == pytest.approx(
            point["tokens_per_second"], rel=1e-9
        )
        low, high = point["tokens_per_second_range"]
        assert low <= point["tokens_per_second"] <= high
        assert point["seconds_to_first_token"] > 0
        assert (point["peak_bytes"], point["error"]) == (None, None)
    student = result["models"]["student"]
    assert student["replaced"] == [0]
    assert student["layers"] == 4
    assert student["backend"] == "torch"
    assert student["weights"] == "mimic start, not trained"
    assert student["kv_bytes_per_token"] * 4 == result["models"]["teacher"]["kv_bytes_per_token"] * 3
    assert student["state_bytes"] > 0 == result["models"]["teacher"]["state_bytes"]
    assert {facts["attention"] for facts in result["models"].values()} == {"sdpa"}
    assert "a CPU's memory" in result["device"]["peak_bytes"]
    assert {p.name for p in folder.iterdir()} == {
        "bench.json",
        *(f"{n}.{k}" for n in ("speed", "memory") for k in ("svg", "png")),
    }
    shown = flat(done.stdout)
    assert "the engine's gain over generate()" in shown
    assert "1 of 4 layers Mamba-2 (torch)" in shown
    assert "peak: not measured" in shown


def test_bench_needs_no_artifact_and_writes_none(run_file: Path, settings: dict[str, Any]) -> None:
    done = decant("bench", str(run_file), "--contexts", "8", "--batches", "1", "--new-tokens", "2", "--repeats", "1")
    assert done.exit_code == 0, done.output
    assert not Path(settings["store"]).exists()


def test_finished_training_is_what_is_measured(run_of: Callable[..., RunConfig]) -> None:
    run = run_of(distill={"phases": [{"kind": "align", "steps": 1, "batch": 1}]})
    assert of_run(run, 0, random=False)[1].weights == "mimic start, not trained"
    student = start_student(run)
    with torch.no_grad():
        mixers(student)[0].out_proj.weight.fill_(0.125)
    finish_training(run, student)
    found = of_run(run, 0, random=False)[1]
    assert found.weights == "distill/tiny@1"
    loaded = found.load(torch.float32, CPU)
    assert bool((mixers(loaded)[0].out_proj.weight == 0.125).all())


def test_folders_of_a_teacher_and_an_exported_student(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "teacher")
    model = hybrid(build("llama"), (1, 2))
    save_hybrid(model, tmp_path / "student")
    names = [str(tmp_path / name) for name in ("teacher", "student")]
    teacher, student = of_folders(names[0], names[1], None, 0, random=False)
    result = bench([teacher, student], SETTINGS, CPU)
    assert result["models"]["teacher"]["replaced"] == []
    assert result["models"]["student"]["replaced"] == [1, 2]
    assert result["models"]["student"]["weights_bytes"] == footprint(load_hybrid(names[1])).held
    made = of_folders(names[0], None, 0.5, 0, random=False)[1].load(torch.float32, CPU)
    assert sorted(mixers(made)) == [0, 2]


def test_random_weights_need_a_configuration_alone_and_are_of_the_seed(tmp_path: Path, tiny: str) -> None:
    build("llama").config.save_pretrained(tmp_path / "bare")
    for source in (str(tmp_path / "bare"), tiny):
        teacher, student = of_folders(source, None, 1.0, 7, random=True)
        one, other, mixed = (c.load(torch.float32, CPU) for c in (teacher, teacher, student))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
        assert all(bool(p.isfinite().all()) for p in (*one.parameters(), *mixed.parameters()))
        assert sorted(mixers(mixed)) == [0, 1, 2, 3]
        different = of_folders(source, None, 1.0, 8, random=True)[0].load(torch.float32, CPU)
        assert not torch.equal(next(one.parameters()), next(different.parameters()))


def test_random_weights_of_a_run_have_the_runs_sizes(run_of: Callable[..., RunConfig]) -> None:
    run = run_of()
    own, drawn = (of_run(run, 0, random=random) for random in (False, True))
    for a, b in zip(own, drawn, strict=True):
        assert footprint(a.load(torch.bfloat16, CPU)) == footprint(b.load(torch.bfloat16, CPU))
    assert drawn[1].weights == "random, seed 0"


def meter(speed: Callable[[int], float], memory: int = 10**15) -> Meter:
    """Of a model whose engine takes so many seconds a token at a context."""

    def run(prompts: torch.Tensor, new_tokens: int) -> Decoded:
        seconds = speed(prompts.shape[1])
        return Decoded(torch.zeros(prompts.shape[0], new_tokens), 3 * seconds, seconds * (new_tokens - 1))

    timing.ENGINES["fake"] = lambda _: run
    model = build("phi")
    chosen_ones = BenchSettings((8, 16), (4,), ("fake",), new_tokens=5, repeats=3, dtype="float32")
    return Meter("teacher", model, Footprint(1000, 600, (KeptLayer(10),), 7), chosen_ones, 1e4, memory)


@pytest.fixture
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ENGINES", timing.ENGINES)
    monkeypatch.setitem(timing.ENGINES, "fake", timing.by_engine)


@pytest.mark.usefixtures("_fake")
def test_figures_are_medians_of_the_repeats_without_the_warm_up() -> None:
    seconds = iter([99.0, 0.4, 0.1, 0.2])
    point = meter(lambda _: next(seconds)).point("fake", 4, 8)
    assert point["seconds_to_first_token"] == pytest.approx(0.6)
    assert point["seconds"] == pytest.approx(0.8)
    assert point["tokens_per_second"] == pytest.approx(4 / 0.2)
    assert point["tokens_per_second_range"] == pytest.approx([4 / 0.4, 4 / 0.1])
    # four steps after 8 tokens: 9, 10, 11 and 12 of 10 bytes, states read and written
    moved = sum(600 + 4 * (10 * c + 14) for c in (9, 10, 11, 12))
    assert point["roofline_tokens_per_second"] == pytest.approx(16 * 1e4 / moved)
    assert point["roofline_share"] == pytest.approx(point["tokens_per_second"] * moved / (16 * 1e4))
    assert point["formula_bytes"] == 1000 + 4 * (10 * 13 + 7)


@pytest.mark.usefixtures("_fake")
@pytest.mark.parametrize(
    "refusal",
    [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("[enforce] not enough memory: you tried")],
)
def test_a_point_out_of_memory_is_a_row_and_the_others_are_measured(refusal: RuntimeError) -> None:
    def speed(context: int) -> float:
        if context > 8:
            raise refusal
        return 0.5

    small, large = meter(speed).all()
    assert (small["error"], small["tokens_per_second"]) == (None, pytest.approx(8))
    assert large["error"] == "out of memory"
    assert large["reason"] == str(refusal)
    assert [large[k] for k in ("tokens_per_second", "seconds_to_first_token", "peak_bytes", "roofline_share")] == [
        None
    ] * 4
    assert large["roofline_tokens_per_second"] > 0 < large["formula_bytes"]


@pytest.mark.usefixtures("_fake")
def test_what_the_formula_says_cannot_fit_is_not_tried() -> None:
    needs = 1000 + 4 * (10 * 13 + 7)
    tried: list[int] = []
    small, large = meter(lambda context: tried.append(context) or 0.5, memory=needs).all()  # type: ignore[func-returns-value]
    assert (small["error"], large["error"]) == (None, "out of memory")
    assert "by the formula" in large["reason"]
    assert set(tried) == {8}


@pytest.mark.usefixtures("_fake")
def test_a_run_does_not_hold_the_memory_of_the_one_before() -> None:
    class Cache:
        def __init__(self) -> None:
            self.siblings = [self]

    held: list[int] = []
    made: list[weakref.ref[Cache]] = []

    def speed(_: int) -> float:
        held.append(sum(ref() is not None for ref in made))
        made.append(weakref.ref(Cache()))
        return 0.5

    gc.disable()
    try:
        meter(speed).point("fake", 1, 8)
    finally:
        gc.enable()
    assert held == [0, 0, 0, 0]


@pytest.mark.usefixtures("_fake")
def test_other_failures_are_not_taken_for_a_lack_of_memory() -> None:
    def speed(_: int) -> float:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        meter(speed).point("fake", 1, 8)


def test_a_model_that_does_not_fit_is_named(tiny: str) -> None:
    def load(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    student = contestants.Contestant("student", "its own", load)
    with pytest.raises(MemoryExhausted, match=r"the student \(its own\) in float32 does not fit"):
        bench([student], SETTINGS, CPU)


def result_with_a_gap() -> dict[str, Any]:
    points = []
    for who in ("teacher", "student"):
        for engine in ("decant", "generate"):
            for batch in (1, 4):
                for context in (1024, 4096):
                    gone = who == "teacher" and (batch, context) == (4, 4096)
                    speed = None if gone else 100.0 * batch / (1 if who == "student" else 2)
                    points.append(
                        {
                            "model": who,
                            "engine": engine,
                            "batch": batch,
                            "context": context,
                            "new_tokens": 64,
                            "seconds_to_first_token": None if gone else 0.5,
                            "tokens_per_second": speed if engine == "decant" or gone else speed and speed / 4,
                            "tokens_per_second_range": [90.0, 110.0],
                            "roofline_tokens_per_second": (1500.0 if who == "student" else 1000.0) * batch,
                            "roofline_share": 0.1,
                            "peak_bytes": None if gone else 7e9,
                            "formula_bytes": 6e9,
                            "error": "out of memory" if gone else None,
                        }
                    )
    facts = {"weights": "random, seed 0", "layers": 32, "replaced": [], "backend": None, "attention": "sdpa"}
    return {
        "device": {"name": "a device", "peak_bytes": ""},
        "bandwidth_bytes_per_second": 3e12,
        "bandwidth_range": [2.9e12, 3.1e12],
        "settings": {"dtype": "bfloat16", "new_tokens": 64, "repeats": 3},
        "models": {"teacher": facts, "student": {**facts, "replaced": [0, 4], "backend": "mamba-ssm"}},
        "points": sorted(points, key=lambda p: (p["batch"], p["context"], p["engine"] != "decant")),
    }


def test_table_compares_within_an_engine_and_tells_the_engines_gain_apart() -> None:
    console = Console(width=200, file=io.StringIO(), record=True)
    show(result_with_a_gap(), console)
    text = console.export_text()
    rows = [line.split() for line in text.splitlines()]
    for engine in ("decant", "generate"):
        student = [row for row in rows if "student" in row and engine in row]
        assert ["2.00" in row for row in student] == [True, True, True, False]  # the teacher has no last figure
        assert all("1.50" in row for row in student)
    assert "out of memory" in text
    assert text.count("gain over generate(): 4.00 to 4.00 ×") == 2
    assert "2 of 32 layers Mamba-2 (mamba-ssm)" in text
    assert "copies move 3 TB/s (2.9 TB to 3.1 TB)" in flat(text)


@pytest.mark.parametrize("chart", [speed_chart, memory_chart])
def test_pictures_hold_every_line_and_come_out_the_same(chart: Any) -> None:
    result = result_with_a_gap()
    svg = chart(result, "svg")
    assert svg == chart(result, "svg")
    text = svg.decode()
    names = ("decant", "generate", "roofline") if chart is speed_chart else ("peak", "formula")
    for name in (f"{who}, {kind}" for who in ("teacher", "student") for kind in names):
        assert name in text, name
    assert "batch 4" in text
    assert "4k" in text
    assert chart(result, "png").startswith(b"\x89PNG")


def test_a_result_without_measured_peaks_is_drawn(tmp_path: Path) -> None:
    result = result_with_a_gap()
    for point in result["points"]:
        point["peak_bytes"] = None
    assert "teacher, peak" not in memory_chart(result, "svg").decode()
    assert write(result, tmp_path) == ["bench.json", "speed.svg", "speed.png", "memory.svg", "memory.png"]
    assert json.loads((tmp_path / "bench.json").read_text()) == result


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "neither a run file nor --model"),
        (["--set", "a=b"], "give the run file"),
        (["RUN", "--model", "x"], "leave out --model, --student and --ratio"),
        (["RUN", "--ratio", "0.5"], "--set student.layers.ratio=0.5"),
        (["--model", "phi-2"], "is a configuration without weights; add --random"),
        (["--model", "phi-2", "--random", "--student", "x"], "--student: has its own weights"),
        (["--model", "phi-2", "--random", "--ratio", "1.5"], "--ratio 1.5: is no share of the layers"),
        (["RUN", "--contexts", "1k,none"], "--contexts 1k,none: expected whole numbers above 0"),
        (["RUN", "--batches", "0"], "--batches 0: expected whole numbers above 0"),
        (["RUN", "--engines", "decant,vllm"], "vllm is not known; there are decant, generate"),
    ],
)
def test_what_does_not_go_together_is_refused(run_file: Path, arguments: list[str], says: str) -> None:
    refused(decant("bench", *(str(run_file) if a == "RUN" else a for a in arguments)), says)


def test_folder_that_cannot_be_made_is_told_before_anything_is_measured(run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(decant("bench", str(run_file), "--out", str(tmp_path / "file" / "x")), "--out", "cannot be made")


def test_numbers_and_names_of_the_options() -> None:
    assert whole_numbers("4k, 512,1K,512", "--contexts") == (512, 1024, 4096)
    assert engine_names("generate,decant") == ("decant", "generate")
    asked = Asked(None, None, "decant", 8, 2, None, 0)
    assert asked.settings(CPU).contexts == (256, 512, 1024)
    assert asked.settings(CPU).dtype == "float32"
    assert asked.settings(torch.device("cuda")).contexts[-1] == 65536
    assert asked.settings(torch.device("cuda")).dtype == "bfloat16"


def test_without_run_and_model_nothing_is_chosen() -> None:
    with pytest.raises(ConfigInvalid, match="neither"):
        chosen(None, None, None, None, 0, random=False)
