"""Commands that tell what students are worth: their answers, sweeps, speed, pages, scores."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.options import Code, DryRun, On, Overrides, load, out, readable_errors
from schemas.errors import ConfigInvalid


def ablate(
    sweep: Annotated[Path, typer.Argument(help="The sweep file; see jobs/configs/sweeps/.", metavar="SWEEP.yaml")],
    set_: Overrides = None,
    dry_run: DryRun = False,
    on: On = "local",
    code: Code = "upload",
) -> None:
    """Train and evaluate a matrix of students from one cache, several at once; table them with their spread.

    --set overrides a field of the sweep (seeds=[0], trial.gpus=0.25), or else a setting of its base run.
    """
    with readable_errors():
        from jobs.ablate import ablate as run

        if status := run(sweep, set_ or (), out, dry_run=dry_run, on=on, code=code):
            raise typer.Exit(status)


def report(
    target: Annotated[
        str,
        typer.Argument(help="A run file, or a sweep's table.json.", metavar="RUN.yaml|TABLE.json", show_default=False),
    ],
    set_: Overrides = None,
    bench: Annotated[
        Path | None, typer.Option(help="What `decant bench` measured, to go into the report.", metavar="bench.json")
    ] = None,
    destination: Annotated[
        Path | None, typer.Option("--out", help="The page to write; else into the store.", metavar="FILE.html")
    ] = None,
) -> None:
    """Write the page of a run, of what is finished of it, or of a sweep."""
    with readable_errors():
        from jobs.report import report as run

        run(target, set_ or [], bench, destination, out)


def bench(
    run_file: Annotated[
        Path | None, typer.Argument(help="A run file: its teacher and student.", metavar="[RUN.yaml]")
    ] = None,
    set_: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(help="Without a run: the teacher's folder or name on the hub; or phi-2.", metavar="FOLDER"),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(help="With --model: an exported student.", metavar="FOLDER", show_default="of the model"),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(help="With --model: the share of layers that its student replaces.", show_default="0.25"),
    ] = None,
    random: Annotated[
        bool, typer.Option("--random", help="Random weights of the same sizes: only configurations are read.")
    ] = False,
    contexts: Annotated[
        str | None,
        typer.Option(help="Tokens of the prompts.", metavar="A,B", show_default="1k to 64k; on a CPU 256 to 1k"),
    ] = None,
    batches: Annotated[
        str | None, typer.Option(help="Prompts at once.", metavar="A,B", show_default="1,8; on a CPU 1,4")
    ] = None,
    engines: Annotated[
        str, typer.Option(help="decant: ours, as in evaluation; generate: transformers' generate().", metavar="A,B")
    ] = "decant,generate",
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate after each prompt.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="How often each point is measured, after once to warm up.")] = 3,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="Type of the weights.", show_default="bfloat16; on a CPU float32"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of prompts and random weights.")] = 0,
    out_: Annotated[
        Path | None, typer.Option("--out", help="Write bench.json and pictures into this folder.", metavar="FOLDER")
    ] = None,
) -> None:
    """Measure generation of teacher and student on this machine, beside what their bytes allow."""
    with readable_errors():
        if set_ and not run_file:
            raise ConfigInvalid("bench: --set overrides a run file's settings; give the run file")
        run = load(run_file, set_) if run_file else None
        # caches of many sizes follow each other, which else leaves memory set aside in pieces too small for the next
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        from jobs.bench import Asked, run_bench
        from jobs.contestants import chosen

        contestants, device = chosen(run, model, student, ratio, seed, random=random)
        run_bench(contestants, Asked(contexts, batches, engines, new_tokens, repeats, dtype, seed), device, out_, out)


def score(
    task: Annotated[str, typer.Argument(help="The benchmark, as evaluate.benchmarks names it.", metavar="TASK")],
    folder: Annotated[Path, typer.Argument(help="The folder with its files as they are published.")],
    answers: Annotated[
        Path, typer.Argument(help="JSON Lines of id (or question_id) and text (or answer).", metavar="ANSWERS.jsonl")
    ],
    seed: Annotated[
        int | None, typer.Option(help="Of guesses where an answer says nothing (MMMU); without one it is wrong.")
    ] = None,
    files: Annotated[
        Path | None, typer.Option(help="Write here what the benchmark's server or grader takes.", metavar="FOLDER")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Score a file of answers to a benchmark, whoever gave them."""
    with readable_errors():
        from jobs.score import benchmark
        from jobs.score import score as run

        run(benchmark(task, folder, seed), answers, out, as_json=json_, files=files)


def generate(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder of a teacher or exported student, a teacher's name on the hub, or a run file.",
            metavar="MODEL|RUN.yaml",
            show_default=False,
        ),
    ],
    prompt: Annotated[
        str,
        typer.Option(
            help="What is asked; - reads it from stdin. An <image> in it is an image's place; else they stand first.",
            metavar="TEXT",
            show_default=False,
        ),
    ],
    image: Annotated[
        list[Path] | None, typer.Option(help="An image file; once for each, in their order.", metavar="FILE")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="The system's text, where the template has a place for it.", metavar="TEXT")
    ] = None,
    which: Annotated[
        Literal["teacher", "student"] | None,
        typer.Option(help="Of a run file: who answers.", show_default="student"),
    ] = None,
    set_: Overrides = None,
    template: Annotated[
        Literal["own", "phi", "llama", "qwen2_base", "qwen2_instruct", "gemma", "pretrain"] | None,
        typer.Option(help="Conversation template.", metavar="NAME", show_default="the model's or run's own"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer at the most.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="Of draws from the whole distribution; 0: greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="Type of the weights.", show_default="bfloat16; on a CPU float32"),
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"] | None,
        typer.Option(help="Where it computes.", show_default="auto, or as the run says"),
    ] = None,
    backend: Annotated[
        Literal["auto", "torch", "mamba-ssm"] | None,
        typer.Option(help="Who computes a student's mixers.", show_default="auto, or as the run says"),
    ] = None,
) -> None:
    """Answer a prompt with images; the answer streams to stdout, who answers and how fast goes to stderr."""
    with readable_errors():
        from jobs.generate import Asked
        from jobs.generate import generate as run
        from jobs.speakers import Choices, speaker
        from pipeline.generation import Generation

        asked, how = Asked(prompt, image or (), system), Generation(1, max_new_tokens, temperature, seed)
        who = speaker(model, Choices(which, set_ or (), template, device, backend))
        if status := run(who, asked, how, dtype):
            raise typer.Exit(status)


COMMANDS = (generate, ablate, report, bench, score)
