"""Runs or previews a stage by name, and what several stages' identities need: facts about teacher, layers and files."""

import importlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.submitted import submission_id
from pipeline.folders import folder_digests
from pipeline.hub import folder_of, pinned
from pipeline.stage import Stage, read_record, run_stage, status
from pipeline.store import Store
from schemas.config import RunConfig, StoreConfig, TeacherConfig
from schemas.errors import ConfigInvalid
from schemas.layers import LayerPlan, plan_layers
from schemas.runfile import dump_run
from schemas.tables import REJECTS_FILE

NAMES = ("prepare", "cache", "distill", "evaluate", "export")


def load_stage(name: str, run: RunConfig) -> Stage:
    """The named stage of a run; refuses every setting that can be refused before any work."""
    stage: Stage = importlib.import_module(f"jobs.{name}").stage(run)
    return stage


def run_named(name: str, run: RunConfig, out: Console) -> None:
    """Runs one stage of a run and says what was done, also where that is nothing."""
    stage = load_stage(name, run)
    record, ran = run_stage(open_store(run), stage, submission_id())
    if ran:
        out.print(f"[green]{stage.ref}[/] done in {record.provenance['seconds']:.1f} s")
        if record.result.get("rejected"):
            where = open_store(run).path(f"{stage.ref}/{REJECTS_FILE}")
            out.print(f"[yellow]{record.result['rejected']} records were skipped[/]; the reasons are in {where}")
        if record.result.get("truncated"):
            cut, of = record.result["cut_tokens"], record.result["cut_response_tokens"]
            out.print(
                f"[yellow]{record.result['truncated']} samples were cut[/] to prepare.max_length: {cut} tokens, "
                f"{of} of them of answers"
            )
        if record.result.get("end_token") is False:
            out.print(
                "[yellow]the chat template ends answers without a special token[/], so a student cannot learn to end "
                "them; prepare.template has those that LLaVA's and TinyLLaVA's checkpoints were trained with"
            )
        if record.result.get("duplicates"):
            out.print(f"[yellow]{record.result['duplicates']} samples are in the data more than once[/]")
    else:
        out.print(f"[green]{stage.ref}[/] is already done (fingerprint {record.fingerprint[:8]}); nothing to do")


def preview(names: Sequence[str], run: RunConfig, out: Console) -> None:
    """Checks everything that can be checked before work, and prints the resolved run and what would be done."""
    stages, store = [load_stage(name, run) for name in names], open_store(run)
    made = [str(stage.ref) for stage in stages]
    states = [_state(store, stage, made) for stage in stages]
    out.print(dump_run(run), end="", markup=False)
    for stage, state in zip(stages, states, strict=True):
        out.print(f"# {store.path(str(stage.ref))} {state}", markup=False)


def _state(store: Store, stage: Stage, made: Sequence[str]) -> str:
    """What would become of a stage, where the artifacts in ``made`` are made before it if they are not there."""
    if any(str(ref) in made and read_record(store, ref) is None for ref in stage.inputs):
        return "would be made after that"
    says = {"done": "is already done", "partial": "is begun and would be continued", "new": "would be made"}
    return says[status(store, stage)]


@lru_cache(maxsize=4)
def teacher_digests(teacher: TeacherConfig) -> dict[str, str]:
    """Digests of the teacher's weights and processor; hashing gigabytes once a process is enough."""
    return {**folder_digests(folder_of(teacher)), **reading(teacher)}


def reading(teacher: TeacherConfig) -> dict[str, str]:
    """What of the run file changes how the teacher reads, where it does; absent otherwise."""
    return {} if teacher.aspect == "processor" else {"aspect": teacher.aspect}


def layer_plan(run: RunConfig) -> LayerPlan:
    """The run's replaced layers, checked against the teacher's configuration."""
    from pipeline.models import load_config

    teacher_digests(run.teacher)
    return plan_layers(run.student.layers, load_config(run.teacher).get_text_config().num_hidden_layers)


def tapped_layers(run: RunConfig) -> tuple[int, ...]:
    """The layers that the run's cache taps."""
    plan, taps = layer_plan(run), run.cache.taps
    if taps.fraction == 0:
        return ()
    if taps.layers == "replaced":
        return plan.replaced
    if taps.layers == "all":
        return tuple(range(plan.total))
    bad = [i for i in taps.layers if not 0 <= i < plan.total]
    if bad:
        raise ConfigInvalid(f"cache.taps.layers: {bad} are not layers from 0 to {plan.total - 1} of this decoder")
    return tuple(sorted(set(taps.layers)))


def refuse_image_positions(run: RunConfig, setting: str, remedy: str) -> None:
    """Raises ConfigInvalid where a token's position does not follow from its place, which ``setting`` needs."""
    from pipeline.models import has_image_positions, load_config

    if has_image_positions(load_config(run.teacher)):
        raise ConfigInvalid(
            f"{setting} needs positions that follow from a token's place; this teacher's (3-D) come from its images: "
            f"{remedy}"
        )


def resolved(run: RunConfig) -> dict[str, Any]:
    """The run for the record, every default written out; how the store is reached is nobody's business."""
    return {**run.model_dump(mode="json"), "store": run.store.url}


def open_store(run: RunConfig) -> Store:
    """The run's store."""
    return Store(store_of(run))


def store_of(run: RunConfig) -> StoreConfig:
    """Where the run's store is, for workers."""
    url = run.store.url
    return run.store.model_copy(update={"url": url if "://" in url else str(Path(url).absolute())})


def teacher_of(run: RunConfig) -> TeacherConfig:
    """The teacher for workers: a folder, or a name on the hub with the commit to take."""
    return pinned(run.teacher)
