"""The command line: one command a stage, and the demo. Heavy imports happen inside the commands."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from jobs.options import Code, DryRun, On, Overrides, RunFile, load, out, readable_errors
from jobs.worth import COMMANDS

if TYPE_CHECKING:
    from schemas.config import RunConfig

app = typer.Typer(
    help="Turn a pretrained vision-language Transformer into a Mamba-2 hybrid, from a cache of its teacher.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
Dashboard = Annotated[
    str, typer.Option("--on", help="The cluster's dashboard.", metavar="ADDRESS", envvar="RAY_API_SERVER_ADDRESS")
]
JobName = Annotated[str, typer.Argument(help="The job's name, as `decant jobs list` has it.", metavar="JOB")]


def _command(name: str, text: str) -> Callable[..., None]:
    def command(
        run_file: RunFile, set_: Overrides = None, dry_run: DryRun = False, on: On = "local", code: Code = "upload"
    ) -> None:
        with readable_errors():
            run = load(run_file, set_)
            _run_stages([name], run, on, code, dry_run=dry_run)

    command.__doc__ = text
    return command


def _run_stages(
    names: Sequence[str], run: "RunConfig", on: str, code: Literal["upload", "installed"], *, dry_run: bool
) -> None:
    from jobs.remote import run_stages
    from jobs.stages import preview

    if dry_run:
        preview(names, run, out)
    elif status := run_stages(names, run, on, code, out):
        raise typer.Exit(status)


STAGES = {
    "prepare": "Tokenise conversations and pack images into the samples table.",
    "cache": "Run the teacher once over all samples (Ray Data); write targets and taps.",
    "distill": "Train the hybrid student from the cache alone (Ray Train).",
    "evaluate": "Exact match and held-out KL of teacher, untrained and trained student.",
    "export": "Write the student as one self-contained folder.",
}
for _name, _text in STAGES.items():
    app.command(_name)(_command(_name, _text))


@app.command()
def run(
    run_file: RunFile,
    stages: Annotated[
        str, typer.Option(help="Which, separated by commas; they run in the pipeline's order.", metavar="A,B")
    ] = ",".join(STAGES),
    set_: Overrides = None,
    dry_run: DryRun = False,
    on: On = "local",
    code: Code = "upload",
) -> None:
    """Run several stages one after another; on a cluster, as one job."""
    with readable_errors():
        from jobs.remote import stages_of

        _run_stages(stages_of(stages), load(run_file, set_), on, code, dry_run=dry_run)


for _function in COMMANDS:
    app.command()(_function)

job_commands = typer.Typer(help="List, follow or stop what runs as jobs of a cluster.", no_args_is_help=True)
app.add_typer(job_commands, name="jobs")


@job_commands.command("list")
def list_(on: Dashboard) -> None:
    """List the cluster's jobs that are ours, the latest last."""
    with readable_errors():
        from jobs.remote import list_jobs

        list_jobs(on, out)


@job_commands.command()
def logs(job: JobName, on: Dashboard) -> None:
    """Show what a job prints, from its start to its end; exits as it does."""
    with readable_errors():
        from jobs.remote import follow_job

        if status := follow_job(job, on, out):
            raise typer.Exit(status)


@job_commands.command()
def stop(job: JobName, on: Dashboard) -> None:
    """End a job; what it committed stays."""
    with readable_errors():
        from jobs.remote import stop_job

        stop_job(job, on, out)


@app.command()
def inspect(
    run_file: RunFile,
    artifact: Annotated[
        str | None, typer.Argument(help="A stage, or KIND/NAME@VERSION, to describe.", metavar="[ARTIFACT]")
    ] = None,
    set_: Overrides = None,
    dry_run: DryRun = False,
    picture: Annotated[
        Path | None, typer.Option(help="Write the histograms as a picture (.png or .svg).", metavar="FILE")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check every byte and value of what is finished.")] = False,
    audit: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Run the teacher again on this share of the cache's rows.", metavar="FRACTION"),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove what is found to be wrong, to be made again.")
    ] = False,
) -> None:
    """List the store's artifacts, describe one, verify the run's own, or audit its cache."""
    with readable_errors():
        from jobs.inspect import inspect as run

        run(
            load(run_file, set_),
            out,
            artifact=artifact,
            check=verify,
            fraction=audit,
            repair=repair,
            picture=picture,
            dry_run=dry_run,
        )


@app.command()
def status(
    run_file: RunFile,
    set_: Overrides = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object a look.")] = False,
    watch: Annotated[
        float | None,
        typer.Option(min=0.1, help="Look again after so many seconds, until all is done or Ctrl-C.", metavar="SECONDS"),
    ] = None,
) -> None:
    """Show where each stage stands, from the store alone; works while they run elsewhere."""
    with readable_errors(), suppress(KeyboardInterrupt):
        from jobs.status import status as run

        run(load(run_file, set_), out, as_json=json_, watch=watch)


@app.command()
def plan(
    run_file: RunFile,
    set_: Overrides = None,
    accelerator: Annotated[str, typer.Option(help="Where the teacher and the training would run.")] = "h100",
    accelerators: Annotated[
        Path | None, typer.Option(help="Your table of rates and prices; see jobs/configs/accelerators.yaml.")
    ] = None,
    passes: Annotated[
        float,
        # two: a student and one ablation of it a month; whoever trains more often gains more from a cache
        typer.Option(min=0.0, help="Passes of the teacher a month that not caching would take."),
    ] = 2.0,
    probe: Annotated[
        int | None,
        typer.Option(min=0, help="Samples to run the teacher on here and measure; 0: none.", show_default="if quick"),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print bytes, seconds and dollars as JSON.")] = False,
) -> None:
    """Say what each signal of the teacher would cost to cache, and whether to; writes nothing."""
    with readable_errors():
        run = load(run_file, set_)
        from jobs.plan import as_json, make_plan, show

        found = make_plan(run, accelerator, accelerators, passes, probe)
        if json_:
            print(as_json(found))
        else:
            show(found, out)


@app.command("import-matvlm")
def import_matvlm(
    checkpoint: Annotated[Path, typer.Argument(help="Folder with mamba_config.json and safetensors shards.")],
    teacher: Annotated[Path, typer.Argument(help="Transformers folder of the model that it was made from.")],
    destination: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
) -> None:
    """Turn a checkpoint of MaTVLM's own code into an exported folder."""
    with readable_errors():
        from jobs.import_matvlm import import_matvlm as run

        run(checkpoint, teacher, destination, out)


@app.command("import-teacher")
def import_teacher(
    source: Annotated[str, typer.Argument(help="Folder, or name on the hub, of a TinyLLaVA checkpoint.")],
    destination: Annotated[Path, typer.Argument(help="Transformers folder to write; must not exist.")],
    template: Annotated[
        str | None,
        typer.Option(
            help="Conversation template: phi, llama, qwen2_base, qwen2_instruct, gemma or pretrain.",
            metavar="NAME",
            show_default="the language model's own",
        ),
    ] = None,
) -> None:
    """Turn a TinyLLaVA checkpoint into a transformers folder, for use as a teacher."""
    with readable_errors():
        from jobs.import_teacher import import_teacher as run

        run(source, destination, template, out)


@app.command()
def demo(
    run_file: Annotated[
        Path | None, typer.Argument(help="Another run file than the shipped one.", metavar="[RUN.yaml]")
    ] = None,
    set_: Overrides = None,
    dry_run: DryRun = False,
    train_scenes: Annotated[int, typer.Option(min=1, help="Scenes to distil from.")] = 3072,
    test_scenes: Annotated[int, typer.Option(min=1, help="Held-out scenes to evaluate on.")] = 600,
    on: On = "local",
    code: Code = "upload",
) -> None:
    """Run the whole path on questions about handwritten digits, and write a report."""
    with readable_errors():
        from jobs.demo.run import run_demo

        scenes = {"train_scenes": train_scenes, "test_scenes": test_scenes}
        if status := run_demo(run_file, set_ or [], out, **scenes, dry_run=dry_run, on=on, code=code):
            raise typer.Exit(status)


if __name__ == "__main__":
    app()
