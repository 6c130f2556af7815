"""``decant generate``: the answer of ``generate()``, on stdout as it is made; everything else on stderr."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from transformers import PreTrainedModel
from typer.testing import CliRunner

from jobs import generate as job
from jobs.cli import app
from jobs.speakers import Choices, speaker
from pipeline.data.conversations import Conversation, Turn
from pipeline.data.encoding import Encoder
from pipeline.data.processors import load_processor
from pipeline.generation import Generation, Prompt, generate
from pipeline.models import load_model
from pipeline.student import load_hybrid
from pipeline.surgery import mixers
from schemas.config import RunConfig
from tests.jobs.test_cli import refused
from tests.students import export_student, finish_training, start_student
from tests.teachers import write_teacher

CPU = torch.device("cpu")
QUESTION = "how many digits are there ?"
TOKENS = 8
Make = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def _small_work(_threads: None) -> None:
    """Threads would wait for each other longer than they compute."""
    torch.set_num_threads(1)


def said(*arguments: Any, stdin: str | bytes | None = None) -> Result:
    """What the command gives, in this process."""
    line = ["generate", *(str(a) for a in arguments)]
    return CliRunner().invoke(app, line, input=stdin, env={"COLUMNS": "200"})


def answer(*arguments: Any, stdin: str | None = None) -> str:
    """What it says on stdout, which ends with a line end."""
    done = said(*arguments, "--max-new-tokens", TOKENS, stdin=stdin)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.endswith("\n")
    return done.stdout[:-1]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two picture files of different sizes."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [folder / "one.png", folder / "two.png"]
    for path, shape in zip(paths, [(56, 56, 3), (56, 84, 3)], strict=True):
        Image.fromarray(draw.integers(0, 256, shape, np.uint8)).save(path)
    return paths


@pytest.fixture(scope="module")
def student(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported student with mixers in two of four layers."""
    return export_student(tiny_teacher, tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model whose tokens are bytes, so that characters are several tokens."""
    return write_teacher("qwen2", tmp_path_factory.mktemp("bytewise"))


def expected(model: PreTrainedModel, folder: Path, text: str, images: list[Path], how: Generation | None = None) -> str:
    """The answer without the command; ``text`` has the images' places."""
    processor, files = load_processor(folder), tuple(path.read_bytes() for path in images)
    ids = Encoder(processor, 4096).prompt_ids(Conversation("", "", files, (Turn("user", text),), {}), files)
    return generate(model, processor, [Prompt(ids, files)], how or Generation(1, TOKENS))[0]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What stood on stdout when each token but the first was asked for, and when the last one was made."""
    states: list[str] = []
    real = job.stream

    def recorded(*arguments: Any) -> Iterator[int]:
        for token in real(*arguments):
            yield token
            states.append(sys.stdout.buffer.getvalue().decode())  # type: ignore[attr-defined]

    monkeypatch.setattr(job, "stream", recorded)
    return states


def saying(monkeypatch: pytest.MonkeyPatch, ids: list[int], end: BaseException | None = None) -> list[str]:
    """Has the model say these tokens, and then ``end`` happen; returns what stdout had after each, and ``closed``."""
    states: list[str] = []

    def spoken(*_: Any) -> Iterator[int]:
        try:
            for token in ids:
                yield token
                states.append(sys.stdout.buffer.getvalue().decode())  # type: ignore[attr-defined]
            if end:
                raise end
        finally:
            states.append("closed")

    monkeypatch.setattr(job, "stream", spoken)
    return states


def prompts_of(monkeypatch: pytest.MonkeyPatch) -> list[Prompt]:
    """The prompts that reach the model."""
    found: list[Prompt] = []

    def kept(_: Any, __: Any, prompt: Prompt, ___: Any) -> Iterator[int]:
        found.append(prompt)
        yield from ()

    monkeypatch.setattr(job, "stream", kept)
    return found


def test_teachers_answer_comes_in_pieces_and_is_generates(
    tiny_teacher: Path, pictures: list[Path], written: list[str]
) -> None:
    text = answer(tiny_teacher, "--image", pictures[0], "--prompt", QUESTION)
    whole = expected(load_model(tiny_teacher, torch.float32, CPU), tiny_teacher, f"<image>\n{QUESTION}", pictures[:1])
    assert text == whole
    assert len(set(written)) > 3, "the answer came at once"
    assert all(whole.startswith(state) for state in written)
    assert written[0] == whole.split()[0]


def test_exported_student_answers_as_loaded(student: Path, pictures: list[Path], written: list[str]) -> None:
    done = said(student, "--image", pictures[0], "--prompt", QUESTION, "--max-new-tokens", TOKENS)
    whole = expected(load_hybrid(student), student, f"<image>\n{QUESTION}", pictures[:1])
    assert done.stdout == whole + "\n"
    assert len(set(written)) > 3
    for part in (f"student {student}", "2 of 4 layers Mamba-2 (torch)", "tokens/s", "s to the first", "float32 on cpu"):
        assert part in done.stderr
        assert part not in done.stdout


def test_stdin_is_the_prompt_without_its_last_line_end(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = prompts_of(monkeypatch)
    answer(tiny_teacher, "--prompt", QUESTION)
    answer(tiny_teacher, "--prompt", "-", stdin=QUESTION + "\n")
    given, piped = found
    assert given.ids.tolist() == piped.ids.tolist()
    refused(said(tiny_teacher, "--prompt", "-", stdin=b"caf\xe9"), "SampleInvalid", "expected UTF-8; byte 3 is not")


def test_two_images_stand_in_their_order_first_or_where_the_prompt_says(tmp_path: Path, pictures: list[Path]) -> None:
    folder, found = write_teacher("qwen2-vl", tmp_path), []
    model = load_model(folder, torch.float32, CPU)
    for text, whole, images in (
        ("same?", "<image>\n<image>\nsame?", pictures),
        ("same?", "<image>\n<image>\nsame?", pictures[::-1]),
        ("<image> or <image>?", "<image> or <image>?", pictures),
    ):
        found.append(answer(folder, "--image", images[0], "--image", images[1], "--prompt", text))
        assert found[-1] == expected(model, folder, whole, images)
    assert len(set(found)) == 3, "answers that are alike would not show an order"


def test_system_text_reaches_the_template(bytewise: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = prompts_of(monkeypatch)
    answer(bytewise, "--prompt", "why?", "--system", "Be brief.")
    text = load_processor(bytewise).tokenizer.decode(found[0].ids)
    assert "<|im_start|>system\nBe brief.<|im_end|>" in text
    assert "Be kind." not in text


def test_draws_are_of_seed_and_temperature(tiny_teacher: Path) -> None:
    model = load_model(tiny_teacher, torch.float32, CPU)
    drawn = [answer(tiny_teacher, "--prompt", QUESTION, "--temperature", 1.5, "--seed", seed) for seed in (3, 4)]
    assert drawn == [
        expected(model, tiny_teacher, QUESTION, [], Generation(1, TOKENS, temperature=1.5, seed=seed))
        for seed in (3, 4)
    ]
    assert drawn[0] != drawn[1]


def test_emoji_of_several_tokens_is_written_whole(bytewise: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = load_processor(bytewise).tokenizer("a 😀!\n")["input_ids"]
    states = saying(monkeypatch, ids)
    assert answer(bytewise, "--prompt", "?") == "a 😀!"
    assert states == ["a", "a", "a", "a", "a", "a 😀", "a 😀!", "a 😀!", "closed"]


def test_ctrl_c_ends_with_130_and_what_was_said_stands(bytewise: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = load_processor(bytewise).tokenizer("so far 😀")["input_ids"][:-1]
    states = saying(monkeypatch, ids, KeyboardInterrupt())
    done = said(bytewise, "--prompt", "?")
    assert (done.exit_code, done.stdout) == (130, "so far\n")
    assert f"{len(ids)} tokens" in done.stderr
    assert "stopped by Ctrl-C" in done.stderr
    assert states[-1] == "closed"


def test_reader_that_leaves_ends_the_work_without_a_traceback(bytewise: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []

    def gone() -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    def spoken(*_: Any) -> Iterator[int]:
        monkeypatch.setattr(sys.stdout, "flush", gone)
        try:
            yield from range(10, 60)
            closed.append("at the end")
        finally:
            closed.append("closed")

    monkeypatch.setattr(job, "stream", spoken)
    done = said(bytewise, "--prompt", "?")
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert "Traceback" not in done.stderr
    assert closed == ["closed"], "tokens were made for nobody"


def test_what_cut_the_answer_is_told(bytewise: Path, tiny_teacher: Path) -> None:
    assert "cut at --max-new-tokens" in said(tiny_teacher, "--prompt", "?", "--max-new-tokens", 2).stderr
    asked = (
        1024
        - 3
        - len(
            load_processor(bytewise).tokenizer.apply_chat_template(
                [{"role": "user", "content": ""}], add_generation_prompt=True
            )["input_ids"]
        )
    )
    done = said(bytewise, "--prompt", "x" * asked)
    assert "3 tokens" in done.stderr
    assert "cut where the model's positions end" in done.stderr


@pytest.fixture
def trained(run_of: Make) -> tuple[RunConfig, PreTrainedModel]:
    """A run whose training is finished, and its student."""
    run = run_of()
    model = start_student(run)
    with torch.no_grad():
        mixers(model)[0].out_proj.weight.mul_(-3)
    finish_training(run, model)
    return run, model


@pytest.mark.slow  # loads four models; an exported student and a teacher answer above, test_bench loads a run's student
def test_runs_student_and_teacher_answer(
    run_file: Path, trained: tuple[RunConfig, PreTrainedModel], tiny_teacher: Path
) -> None:
    whole = expected(trained[1], tiny_teacher, QUESTION, [])
    teachers = expected(load_model(tiny_teacher, torch.float32, CPU), tiny_teacher, QUESTION, [])
    assert whole != teachers
    assert answer(run_file, "--device", "cpu", "--backend", "torch", "--prompt", QUESTION) == whole
    assert answer(run_file, "--which", "teacher", "--prompt", QUESTION) == teachers


def test_run_file_means_its_student_or_its_teacher(run_file: Path, trained: tuple[RunConfig, PreTrainedModel]) -> None:
    run, choices = trained[0], Choices(None, (), None, "cpu", "torch")
    names = {
        which: speaker(str(run_file), replace(choices, which=which)).name for which in (None, "student", "teacher")
    }
    student = f"student {run.ref('distill')}"
    assert names == {None: student, "student": student, "teacher": f"teacher {run.teacher.path}"}


def test_runs_student_before_training_names_the_command(run_file: Path) -> None:
    refused(said(run_file, "--prompt", QUESTION), "ArtifactMissing", "distill/tiny@1", "decant distill RUN.yaml")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["TEACHER", "--prompt", " \n"], "--prompt: has no text"),
        (["TEACHER", "--prompt", "?", "--system", ""], "--system: has no text"),
        (["TEACHER", "--prompt", "?", "--system", "<image>"], "--system: <image> may stand in --prompt alone"),
        (["TEACHER", "--prompt", "?", "--image", "none.png"], "--image none.png: No such file or directory"),
        (
            ["TEACHER", "--prompt", "?", "--image", "TEXT"],
            "run.yaml: cannot be decoded: no JPEG, PNG, WebP, GIF or BMP",
        ),
        (["TEACHER", "--prompt", "?", "--image", "."], "--image .: Is a directory"),
        (["TEACHER", "--prompt", "<image><image>", "--image", "PICTURE"], "2 <image> placeholders for 1 images"),
        (["TEACHER", "--prompt", "where is <image> ?"], "1 <image> placeholders for 0 images"),
        (["BYTES", "--prompt", "?", "--image", "PICTURE"], "reads text alone; leave out --image"),
        (["BYTES", "--prompt", "x" * 1024], "1024 positions for prompt and answer; shorten it"),
        (["BYTES", "--prompt", "\udce9"], "--prompt: character 0 is no text"),
        (["STUDENT", "--prompt", "?", "--backend", "mamba-ssm"], "BackendUnavailable"),
        (["TEACHER", "--prompt", "?", "--device", "cuda"], "--device cuda: torch sees no CUDA device here"),
        (["TEACHER", "--prompt", "?", "--which", "student"], "--which and --set are for a run file"),
        (["./nothing", "--prompt", "?"], "./nothing: is not a transformers folder"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_line(
    arguments: list[str],
    says: str,
    tiny_teacher: Path,
    bytewise: Path,
    student: Path,
    pictures: list[Path],
    run_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names = {"TEACHER": tiny_teacher, "BYTES": bytewise, "STUDENT": student, "PICTURE": pictures[0], "TEXT": run_file}
    done = said(*(names.get(a, a) for a in arguments))
    refused(done, says)
    assert done.stdout == ""


def test_model_without_template_asks_for_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, found = write_teacher("phi", tmp_path), prompts_of(monkeypatch)
    refused(said(folder, "--prompt", "?"), "ships no chat template", "--template: phi, llama")
    answer(folder, "--prompt", "why?", "--template", "phi")
    assert load_processor(folder).tokenizer.decode(found[0].ids).endswith("USER: why? ASSISTANT:")


def test_model_that_does_not_fit_is_named(bytewise: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saying(monkeypatch, [], torch.OutOfMemoryError("CUDA out of memory"))
    refused(
        said(bytewise, "--prompt", "?"), "MemoryExhausted", f"teacher {bytewise} in float32 does not fit", "--dtype"
    )


def started(folder: Path) -> "subprocess.Popen[bytes]":
    """The command in a process of its own, with an answer that takes a while."""
    line = [sys.executable, "-m", "jobs.cli", "generate", str(folder), "--prompt", "?", "--temperature", "9"]
    return subprocess.Popen([*line, "--max-new-tokens", "900"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow  # two processes that import torch
def test_pipe_that_closes_and_a_real_ctrl_c(bytewise: Path) -> None:
    with started(bytewise) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.read(1)
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == 1
    with started(bytewise) as process:
        assert process.stdout
        assert os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate()
    assert process.returncode == 130
    assert b"stopped by Ctrl-C" in told
    assert b"Traceback" not in told
