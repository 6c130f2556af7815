"""Stage ``evaluate``: teacher, untrained and trained student answer the same held-out questions, as Ray tasks."""

import json
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from cluster.placement import check_fits, here, worker_options
from cluster.session import session
from jobs.progress import Progress
from jobs.stages import layer_plan, resolved, store_of, teacher_digests, teacher_of
from jobs.train import INITIAL, WEIGHTS
from pipeline.data.encoding import Encoder
from pipeline.data.processors import Processor, load_processor
from pipeline.data.records import data_digest
from pipeline.evaluation import Answers, answer, held_out_kl, read_questions, score
from pipeline.models import load_model, pick_device
from pipeline.ops.backends import resolve
from pipeline.stage import Stage
from pipeline.store import Store
from pipeline.student import apply_trained, build_student
from pipeline.surgery import mixers
from schemas.config import RunConfig, StoreConfig, TeacherConfig
from schemas.layers import LayerPlan
from schemas.sections import Backend

Who = Literal["teacher", "student_untrained", "student"]
PREDICTIONS = "predictions.jsonl"


@dataclass(frozen=True)
class EvaluateJob:
    """What the tasks of one evaluate stage need; plain values, so that it travels."""

    run: RunConfig
    store: StoreConfig
    teacher: TeacherConfig
    plan: LayerPlan
    digests: dict[str, str]


def stage(run: RunConfig) -> Stage:
    """The stage of this run. Identity: the questions, how they are answered, the student and the teacher."""
    config, plan = run.evaluate, layer_plan(run)
    settings = {
        **config.model_dump(mode="json", exclude={"artifact", "data", "images"}),
        "data": data_digest(config.data),
        **({} if run.prepare.template == "own" else {"template": run.prepare.template}),
        "teacher": teacher_digests(run.teacher),
    }

    def work(store: Store, *_: object) -> dict[str, Any]:
        return _evaluate(store, EvaluateJob(run, store_of(run), teacher_of(run), plan, settings["teacher"]))

    return Stage(run.ref("evaluate"), (run.ref("distill"),), settings, work, resolved(run))


def _evaluate(store: Store, job: EvaluateJob) -> dict[str, Any]:
    run = job.run
    whos: list[Who] = ["teacher", "student", *(["student_untrained"] if run.evaluate.untrained else [])]  # type: ignore[list-item]
    questions = read_questions(run.evaluate, _encoder(job, load_processor(job.teacher)))
    with session():
        check_fits(run.placement, "evaluate")
        asked = _ask(job, whos, len(questions))
    answers = {who: found for who, (found, _) in asked.items()}
    head_model = load_model(job.teacher, getattr(torch, run.evaluate.dtype), torch.device("cpu"))
    result: dict[str, Any] = {"backend": asked["student"][1]}
    for who in whos:
        result[who] = {"exact_match": score(questions, answers[who].texts)}
        if who != "teacher":
            result[who]["held_out_kl"] = held_out_kl(head_model, answers["teacher"].hidden, answers[who].hidden)
    lines = [
        {
            "record": q.sample.record,
            "group": q.group,
            "reference": q.reference,
            **{w: answers[w].texts[i] for w in whos},
        }
        for i, q in enumerate(questions)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    store.write(f"{run.ref('evaluate')}/{PREDICTIONS}", text.encode())
    teacher = result["teacher"]["exact_match"]["overall"]["value"]
    result["recovery"] = result["student"]["exact_match"]["overall"]["value"] / teacher if teacher else None
    return result


def _encoder(job: EvaluateJob, processor: Processor) -> Encoder:
    return Encoder(processor, job.run.prepare.max_length, job.run.prepare.template)


def _ask(job: EvaluateJob, whos: list[Who], count: int) -> dict[Who, tuple[Answers, Backend | None]]:
    import ray
    from ray.util.queue import Queue

    place = job.run.placement.evaluate
    mailbox = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here()})
    remote = ray.remote(**worker_options(place))(answer_as)
    waiting = {remote.remote(job, who, mailbox): who for who in whos}
    answers: dict[Who, tuple[Answers, Backend | None]] = {}
    done = dict.fromkeys(whos, 0)
    with Progress("evaluate", count * len(whos), "answers") as progress:
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=1.0)
            for who, number in mailbox.get_nowait_batch(mailbox.qsize()):
                done[who] = number
            progress.update(sum(done.values()))
            for ref in ready:
                answers[waiting.pop(ref)] = ray.get(ref)
        progress.update(count * len(whos))
    mailbox.shutdown(force=True)
    return answers


def answer_as(job: EvaluateJob, who: Who, mailbox: Any) -> tuple[Answers, Backend | None]:
    """Task: one model's answers to all questions."""
    run = job.run
    torch.set_num_threads(max(1, round(run.placement.evaluate.cpus_per_worker)))
    processor = load_processor(job.teacher)
    questions = read_questions(run.evaluate, _encoder(job, processor))

    def progress(number: int) -> None:
        mailbox.put((who, number))

    model = load_contestant(job, who)
    found = answer(model, processor, questions, run.placement.evaluate.batch, run.evaluate.max_new_tokens, progress)
    return found, None if who == "teacher" else next(iter(mixers(model).values())).ops.backend


def load_contestant(job: EvaluateJob, who: Who) -> PreTrainedModel:
    """The teacher, or the student with its weights before or after training."""
    run, device = job.run, pick_device(job.run.placement.device)
    dtype = getattr(torch, run.evaluate.dtype)
    if who == "teacher":
        return load_model(job.teacher, dtype, device)
    ops = resolve(run.placement.backend, device)
    model = build_student(job.teacher, job.plan, run.student.init, run.distill.seed, dtype, device, ops, job.digests)
    name = f"{run.ref('distill')}/{WEIGHTS if who == 'student' else INITIAL}"
    apply_trained(model, Store(job.store).read(name), name)
    return model
