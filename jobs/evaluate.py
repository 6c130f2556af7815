"""Stage ``evaluate``: teacher, untrained and trained student answer the same held-out questions, as Ray tasks.

Teacher and trained student also answer the benchmarks and probes. The teacher's answers are kept, so that the
evaluations of other students can take them instead of asking again.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from cluster.placement import check_fits, here, worker_options
from cluster.session import session
from jobs.progress import Progress
from jobs.stages import layer_plan, resolved, store_of, teacher_digests, teacher_of
from jobs.train import INITIAL, WEIGHTS
from pipeline.benchmarks.asking import ask
from pipeline.benchmarks.exam import Exam, exams, figures, keep_answers, take_teacher
from pipeline.benchmarks.tasks import identity
from pipeline.data.encoding import Encoder
from pipeline.data.processors import Processor, load_processor
from pipeline.data.records import data_digest
from pipeline.distribution import measure
from pipeline.evaluation import Answers, Question, answer, held_out_kl, read_questions, score
from pipeline.models import decoder, load_model, pick_device
from pipeline.ops.backends import resolve
from pipeline.stage import Stage
from pipeline.store import Store
from pipeline.student import apply_trained, build_student
from pipeline.surgery import mixers
from pipeline.teacher_answers import PREDICTIONS, keep_hidden, take_answers
from pipeline.training.recompute import TeacherLayers
from schemas.config import RunConfig, StoreConfig, TeacherConfig
from schemas.errors import ConfigInvalid
from schemas.layers import LayerPlan
from schemas.sections import Backend

Who = Literal["teacher", "student_untrained", "student"]


@dataclass(frozen=True)
class EvaluateJob:
    """What the tasks of one evaluate stage need; plain values, so that it travels."""

    run: RunConfig
    store: StoreConfig
    teacher: TeacherConfig
    plan: LayerPlan
    digests: dict[str, str]

    def exams(self, who: Who, encoder: Encoder) -> list[Exam]:
        """The benchmarks and probes that a model answers; of an untrained student they would tell nothing."""
        return [] if who == "student_untrained" else exams(self.run.evaluate, encoder)


@dataclass(frozen=True)
class Asked:
    """What one model answered: to the run's own questions, and by name to each task's.

    Of a student also who computed its mixers, and its distance from the cached teacher if that is asked for.
    """

    own: Answers
    tasks: dict[str, list[str]]
    backend: Backend | None = None
    distribution: dict[str, Any] | None = None


def evaluate_job(run: RunConfig) -> EvaluateJob:
    """The job of a run."""
    return EvaluateJob(run, store_of(run), teacher_of(run), layer_plan(run), teacher_digests(run.teacher))


def stage(run: RunConfig) -> Stage:
    """The stage of this run. Identity: the questions, how they are answered, the student and the teacher.

    Raises:
        ConfigInvalid: the teacher's answers would be taken from this very evaluation.
    """
    config, answered = run.evaluate, run.answered()
    layer_plan(run)  # refuses layers that the teacher has not
    if answered == run.ref("evaluate"):
        raise ConfigInvalid(
            f"evaluate.teacher: {config.teacher} is this run's own evaluation; name another, or leave it out"
        )
    # absent where they are not asked for, so that evaluations from before are still these settings'
    absent = {name for name in ("probes", "distribution") if not getattr(config, name)}
    settings = {
        **config.model_dump(mode="json", exclude={"artifact", "data", "images", "teacher", "benchmarks", *absent}),
        "data": data_digest(config.data),
        **({"benchmarks": [identity(benchmark) for benchmark in config.benchmarks]} if config.benchmarks else {}),
        **({} if run.prepare.template == "own" else {"template": run.prepare.template}),
        "teacher": teacher_digests(run.teacher),
    }
    other = config.distribution.other() if config.distribution else None
    inputs = (run.ref("distill"), *(ref for ref in (answered, other) if ref))

    def work(store: Store, *_: object) -> dict[str, Any]:
        return _evaluate(store, evaluate_job(run), settings)

    return Stage(run.ref("evaluate"), inputs, settings, work, resolved(run))


def _evaluate(store: Store, job: EvaluateJob, settings: dict[str, Any]) -> dict[str, Any]:
    run = job.run
    encoder = _encoder(job, load_processor(job.teacher))
    questions, asking = read_questions(run.evaluate, encoder), job.exams("student", encoder)
    asked = _answers(store, job, settings, questions, asking)
    answers = {who: found.own for who, found in asked.items()}
    head_model = load_model(job.teacher, getattr(torch, run.evaluate.dtype), torch.device("cpu"))
    result: dict[str, Any] = {"backend": asked["student"].backend}
    for who, found in answers.items():
        result[who] = {"exact_match": score(questions, found.texts)}
        if who != "teacher":
            result[who]["held_out_kl"] = held_out_kl(head_model, answers["teacher"].hidden, found.hidden)
    lines = [
        {
            "record": q.sample.record,
            "sample": q.sample.sample_id,
            "group": q.group,
            "reference": q.reference,
            **{who: found.texts[i] for who, found in answers.items()},
        }
        for i, q in enumerate(questions)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    store.write(f"{run.ref('evaluate')}/{PREDICTIONS}", text.encode())
    teacher = result["teacher"]["exact_match"]["overall"]["value"]
    result["recovery"] = result["student"]["exact_match"]["overall"]["value"] / teacher if teacher else None
    for exam in asking:
        _add_exam(store, job, exam, asked, result)
    if asked["student"].distribution:
        result["distribution"] = asked["student"].distribution
    return result


def _add_exam(store: Store, job: EvaluateJob, exam: Exam, asked: dict[Who, Asked], result: dict[str, Any]) -> None:
    """Keeps the answers to a benchmark or probe, and adds their figures to the result."""
    name = exam.task.name
    said: dict[str, list[str]] = {who: found.tasks[name] for who, found in asked.items() if name in found.tasks}
    keep_answers(store, job.run.ref("evaluate"), exam, said)
    values, shares = figures(exam, said)
    for who, found in values.items():
        result[who].setdefault("tasks", {})[name] = found
    result.setdefault("recoveries", {})[name] = shares


def _answers(
    store: Store, job: EvaluateJob, settings: dict[str, Any], questions: list[Question], asking: list[Exam]
) -> dict[Who, Asked]:
    """What everyone answers, the teacher first."""
    run, answered = job.run, job.run.answered()
    taken: dict[Who, Asked] = {}
    if answered:
        ids = [question.sample.sample_id for question in questions]
        own = take_answers(store, answered, settings, ids)
        taken["teacher"] = Asked(own, {exam.task.name: take_teacher(store, answered, exam) for exam in asking})
    whos: list[Who] = ["teacher", "student"]
    whos += ["student_untrained"] if run.evaluate.untrained else []
    counts = {who: len(questions) for who in whos if who not in taken}
    for who in counts:
        counts[who] += sum(len(exam.items) for exam in asking) if who != "student_untrained" else 0
    asked = _ask(job, counts)
    answers = {who: taken.get(who) or asked[who] for who in whos}
    if not answered:
        keep_hidden(store, run.ref("evaluate"), answers["teacher"].own.hidden, run.evaluate.dtype)
    return answers


def _encoder(job: EvaluateJob, processor: Processor) -> Encoder:
    return Encoder(processor, job.run.prepare.max_length, job.run.prepare.template)


def _ask(job: EvaluateJob, counts: dict[Who, int]) -> dict[Who, Asked]:
    """What each model answers to so many questions."""
    placement, whos, done = job.run.placement, list(counts), dict.fromkeys(counts, 0)
    with Progress("evaluate", sum(counts.values()), "answers") as progress:

        def tell(who: Who, number: int) -> None:
            done[who] = number
            progress.update(sum(done.values()))

        if not placement.evaluate.workers:
            return {who: answer_as(job, who, tell) for who in whos}
        with session():
            check_fits(placement, "evaluate")
            asked = _ask_workers(job, whos, tell)
        for who, count in counts.items():
            tell(who, count)
        return asked


def _ask_workers(job: EvaluateJob, whos: list[Who], tell: Callable[[Who, int], None]) -> dict[Who, Asked]:
    import ray
    from ray.util.queue import Queue

    mailbox = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here()})
    remote = ray.remote(**worker_options(job.run.placement.evaluate))(answer_remotely)
    waiting = {remote.remote(job, who, mailbox): who for who in whos}
    asked: dict[Who, Asked] = {}
    while waiting:
        ready, _ = ray.wait(list(waiting), timeout=1.0)
        for who, number in mailbox.get_nowait_batch(mailbox.qsize()):
            tell(who, number)
        for ref in ready:
            asked[waiting.pop(ref)] = ray.get(ref)
    mailbox.shutdown(force=True)
    return asked


def answer_remotely(job: EvaluateJob, who: Who, mailbox: Any) -> Asked:
    """Task: one model's answers to all questions; its progress goes into the mailbox."""
    return answer_as(job, who, lambda who, number: mailbox.put((who, number)))


def answer_as(job: EvaluateJob, who: Who, tell: Callable[[Who, int], None]) -> Asked:
    """One model's answers to all questions, in this process."""
    run, place = job.run, job.run.placement.evaluate
    torch.set_num_threads(max(1, round(place.cpus_per_worker)))
    processor = load_processor(job.teacher)
    encoder = _encoder(job, processor)
    questions = read_questions(run.evaluate, encoder)
    attention: dict[int, torch.nn.Module] = {}
    model = load_contestant(job, who, attention)
    own = answer(model, processor, questions, place.batch, run.evaluate.max_new_tokens, partial(tell, who))
    tasks, before = {}, len(questions)
    for exam in job.exams(who, encoder):
        progress = partial(_tell_after, tell, who, before)
        tasks[exam.task.name] = ask(model, processor, encoder, exam.task, exam.items, place.batch, progress)
        before += len(exam.items)
    if who == "teacher":
        return Asked(own, tasks)
    backend = next(iter(mixers(model).values())).ops.backend
    return Asked(own, tasks, backend, _distribution(job, model, processor, attention) if who == "student" else None)


def _tell_after(tell: Callable[[Who, int], None], who: Who, before: int, number: int) -> None:
    tell(who, before + number)


def _distribution(
    job: EvaluateJob, model: PreTrainedModel, processor: Processor, attention: dict[int, torch.nn.Module]
) -> dict[str, Any] | None:
    """The student's distance from the cached teacher, where it is asked for."""
    config = job.run.evaluate.distribution
    if config is None:
        return None
    layers = TeacherLayers(attention, decoder(model))
    layers.to(model.device)
    return measure(Store(job.store), job.run, config, model, processor, layers)


def load_contestant(job: EvaluateJob, who: Who, attention: dict[int, torch.nn.Module] | None = None) -> PreTrainedModel:
    """The teacher, or the student with its weights before or after training; ``attention`` as for ``load_student``."""
    dtype, device = getattr(torch, job.run.evaluate.dtype), pick_device(job.run.placement.device)
    if who == "teacher":
        return load_model(job.teacher, dtype, device)
    return load_student(job, WEIGHTS if who == "student" else INITIAL, dtype, device, attention)


def load_student(
    job: EvaluateJob,
    weights: str | None,
    dtype: torch.dtype,
    device: torch.device,
    attention: dict[int, torch.nn.Module] | None = None,
) -> PreTrainedModel:
    """The run's student with a file's weights of its ``distill`` artifact, or as its initialisation leaves it.

    ``attention``, where given, gets the modules that the student's mixers replaced.
    """
    run, ops = job.run, resolve(job.run.placement.backend, device)
    model = build_student(
        job.teacher, job.plan, run.student.init, run.distill.seed, dtype, device, ops, job.digests, attention
    )
    if weights:
        name = f"{run.ref('distill')}/{weights}"
        apply_trained(model, Store(job.store).read(name), name)
    return model
