"""Asks a model the questions of a task: batched greedy answers, alike for teacher and student."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel

from pipeline.benchmarks.task import Item, Task
from pipeline.data.conversations import IMAGE, Conversation, Turn
from pipeline.data.encoding import Encoder
from pipeline.data.processors import Processor
from pipeline.decoding.engine import DecodingEngine
from pipeline.generation import Generation, Prompt, generate

# Batches whose pictures are held at once; questions of similar length are put together among those of so many.
WINDOW = 16


def ask(
    model: PreTrainedModel,
    processor: Processor,
    encoder: Encoder,
    task: Task,
    items: Sequence[Item],
    batch: int,
    progress: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """The answers, in the items' order.

    Raises:
        SampleInvalid: a picture cannot be decoded, or the template has no place for it.
    """
    answers: list[str] = []
    engine = DecodingEngine(model)
    for at in range(0, len(items), WINDOW * batch):
        chosen = items[at : at + WINDOW * batch]
        prompts = [prompt_of(encoder, task, item) for item in chosen]
        before = len(answers)
        answers += generate(
            model,
            processor,
            prompts,
            Generation(batch, task.max_new_tokens),
            lambda done, before=before: progress(before + done),  # type: ignore[misc]
            engine,
        )
    return answers


def prompt_of(encoder: Encoder, task: Task, item: Item) -> Prompt:
    """The question in the teacher's conversation template, its pictures first, a line each."""
    images = item.pictures()
    text = f"{IMAGE}\n" * len(images) + item.prompt
    turns = (Turn("user", text),)
    return Prompt(encoder.prompt_ids(Conversation(task.name, item.id, images, turns, {}), images), images)
