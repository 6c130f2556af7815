"""Decant's teachers and exported students as a model of lmms-eval, with the code that answers everywhere in Decant.

lmms-eval finds ``manifest`` by Decant's entry point in its group ``lmms_eval.models``, so that after
``pip install decant[lmms]`` this works::

    lmms-eval --model decant --model_args pretrained=runs/store/export/demo@1 --tasks mme,gqa --batch_size 8
"""

import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from transformers import PreTrainedModel

from pipeline.data.collate import predicting_positions
from pipeline.data.conversations import IMAGE, Conversation, Turn
from pipeline.data.encoding import EncodedSample, Encoder
from pipeline.data.processors import Aspect, load_processor
from pipeline.generation import Generation, Prompt, generate, model_batch
from pipeline.hub import folder_of
from pipeline.models import body, load_model, logits_head
from pipeline.student import is_exported, load_hybrid
from schemas.config import TeacherConfig, TemplateName
from schemas.errors import ConfigInvalid, SampleInvalid, shown
from schemas.sections import Backend

# lmms-eval's own models take this where a task names no length.
MAX_NEW_TOKENS = 1024
DTYPES = ("float32", "bfloat16", "float16")


def manifest() -> ModelManifest:
    """What lmms-eval's registry needs to know."""
    return ModelManifest(model_id="decant", simple_class_path=f"{__name__}.Decant")


@dataclass(frozen=True)
class Settings:
    """How a task wants to be answered: what lmms-eval calls generation kwargs. ``until`` ends an answer."""

    max_new_tokens: int
    temperature: float
    until: tuple[str, ...]


class Decant(lmms):
    """One model on one device; a process of a distributed run takes the device of its local rank.

    Args:
        pretrained: the folder of an exported student or of a teacher, or a teacher's name on the hub.
        revision: the hub's revision.
        dtype: the type of the weights and of the computation.
        device: such as ``cuda:1``; the default is CUDA where there is one.
        batch_size: questions answered at once.
        max_batch_size: lmms-eval gives it; there is no automatic batch size here, so it has no effect.
        backend: of a student's mixers.
        template: the chat template, if not the model's own.
        aspect: how a teacher's pictures are framed, if not as its processor says; a student knows it.
        seed: for tasks that want answers drawn.

    Raises:
        ConfigInvalid: the folder holds no such model, or an argument cannot be used.
    """

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,  # noqa: ARG002
        backend: Backend = "auto",
        template: TemplateName = "own",
        aspect: Aspect = "processor",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("dtype", dtype, DTYPES),
            ("backend", backend, get_args(Backend)),
            ("template", template, get_args(TemplateName)),
            ("aspect", aspect, get_args(Aspect)),
        ):
            if value not in known:
                raise ConfigInvalid(f"model_args: {name}: expected one of {', '.join(known)}, got {shown(value)}")
        if not str(batch_size).isdecimal() or not int(batch_size):
            raise ConfigInvalid(f"batch_size: expected a number from 1 on, got {shown(batch_size)}")
        teacher = TeacherConfig(path=pretrained, revision=revision, aspect=aspect)
        self.device, self.batch_size, self.seed = _device(device), int(batch_size), seed
        self.model = _load(teacher, getattr(torch, dtype), self.device, backend)
        self.processor = load_processor(teacher)
        # nothing is cut: lmms-eval has no notion of a maximum length
        self.encoder = Encoder(self.processor, sys.maxsize, template)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The answers, up to the first of the texts that a task names as their end."""
        found: dict[int, str] = {}
        for settings, places in _by_settings(requests).items():
            prompts = [self._prompt(_Asked.of_generation(requests[at].args)) for at in places]
            how = Generation(self.batch_size, settings.max_new_tokens, settings.temperature, self.seed)
            texts = generate(self.model, self.processor, prompts, how)
            found |= {at: ended(text, settings.until) for at, text in zip(places, texts, strict=True)}
        for at, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args[:2], found[at])
        return [found[at] for at in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """For each continuation its loss, and whether greedy decoding would give it.

        The loss is the mean negative log-probability of its tokens and of the token that ends the answer, in nats.
        lmms-eval's documentation says log-likelihood, but its evaluator takes the option with the smallest number, and
        its own models return the loss. (Its release 0.7.3 makes text of these pairs before its metrics for multiple
        choice read them, so that such tasks end in an error there with every model.)
        """
        samples = [self._sample(request.args) for request in requests]
        order = sorted(range(len(samples)), key=lambda at: len(samples[at].input_ids))
        found: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            found.update(zip(chosen, self._losses([samples[at] for at in chosen]), strict=True))
        return [found[at] for at in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Raises ConfigInvalid: answers in several rounds are not made here."""
        raise ConfigInvalid(
            f"task {requests[0].args[5]}: asks in several rounds, which Decant does not answer; choose another task"
        )

    def _prompt(self, asked: "_Asked") -> Prompt:
        conversation, images = self._conversation(asked)
        return Prompt(self.encoder.prompt_ids(conversation, images), images)

    def _sample(self, args: tuple[Any, ...]) -> EncodedSample:
        asked, wanted = _Asked.of_choice(args), args[1]
        text = wanted if isinstance(wanted, str) else str(wanted(self._document(asked)))
        conversation, images = self._conversation(asked, Turn("assistant", text.strip()))
        return self.encoder.encode(conversation, images)

    def _conversation(self, asked: "_Asked", *answer: Turn) -> tuple[Conversation, tuple[bytes, ...]]:
        """The question with its pictures first, as LLaVA puts them, unless it says itself where they stand."""
        where = f"lmms-eval's task {asked.task}"
        visuals = (asked.visuals(self._document(asked)) or []) if asked.visuals else []
        images = tuple(png(visual, f"{where}: document {asked.document}") for visual in visuals)
        marks = "" if IMAGE in asked.context else f"{IMAGE}\n" * len(images)
        turns = (Turn("user", marks + asked.context), *answer)
        return Conversation(where, str(asked.document), images, turns, {}), images

    def _document(self, asked: "_Asked") -> Any:
        return self.task_dict[asked.task][asked.split][asked.document]

    @torch.no_grad()
    def _losses(self, samples: Sequence[EncodedSample]) -> list[tuple[float, bool]]:
        prompts = [Prompt(sample.input_ids, sample.images) for sample in samples]
        inputs = model_batch(self.model, self.processor, prompts, left=False)
        states_BLD = body(self.model)(**inputs, use_cache=False).last_hidden_state
        found = []
        for sample, states_LD in zip(samples, states_BLD, strict=True):
            at = predicting_positions(sample.spans)
            wanted_P = torch.from_numpy(sample.input_ids[at + 1].astype(np.int64)).to(states_LD.device)
            logits_PV = logits_head(self.model)(states_LD[torch.from_numpy(at).to(states_LD.device)]).float()
            loss = torch.nn.functional.cross_entropy(logits_PV, wanted_P)
            found.append((float(loss), bool((logits_PV.argmax(-1) == wanted_P).all())))
        return found


@dataclass(frozen=True)
class _Asked:
    """A request's parts; ``visuals`` gives a document's pictures, None for a question without a document."""

    context: str
    visuals: Callable[[Any], Any] | None
    document: Any
    task: str
    split: str

    @classmethod
    def of_generation(cls, args: tuple[Any, ...]) -> "_Asked":
        context, _, visuals, document, task, split = args
        return cls(context, visuals, document, task, split)

    @classmethod
    def of_choice(cls, args: tuple[Any, ...]) -> "_Asked":
        """Of (context, continuation), which asks how likely an option is by itself, or with the four parts more."""
        return cls.of_generation(args) if len(args) > 2 else cls(args[0], None, None, "", "")


def _device(name: str | None) -> torch.device:
    if name is None and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.device(name or "cpu")
    except RuntimeError as error:
        raise ConfigInvalid(f"device: {shown(name)}: {error}") from None


def _load(teacher: TeacherConfig, dtype: torch.dtype, device: torch.device, backend: Backend) -> PreTrainedModel:
    folder = folder_of(teacher)
    if is_exported(folder):
        return load_hybrid(folder, dtype, device, backend)
    return load_model(teacher, dtype, device)


def _by_settings(requests: Sequence[Instance]) -> dict[Settings, list[int]]:
    """The requests' places by how they want to be answered, as one call answers all alike."""
    found: dict[Settings, list[int]] = {}
    for at, request in enumerate(requests):
        found.setdefault(settings_of(request.args[1], request.args[4]), []).append(at)
    return found


def settings_of(given: dict[str, Any], task: str) -> Settings:
    """Of a task's generation kwargs; what they say of pictures is for other models and has no meaning here.

    As for lmms-eval's own models, answers are drawn only where a temperature above 0 is given.

    Raises:
        ConfigInvalid: they ask for beams, or for draws from a part of the distribution.
    """
    until = given.get("until") or ()
    temperature = float(given.get("temperature") or 0.0)
    draws = temperature > 0 and given.get("do_sample", True)
    if (given.get("num_beams") or 1) != 1:
        raise ConfigInvalid(f"task {task}: num_beams: expected 1, got {given['num_beams']}; `--gen_kwargs num_beams=1`")
    if draws and ((given.get("top_p") or 1) != 1 or given.get("top_k")):
        raise ConfigInvalid(
            f"task {task}: top_p, top_k: answers are drawn from the whole distribution here; "
            "`--gen_kwargs temperature=0` gives greedy ones"
        )
    return Settings(
        int(given.get("max_new_tokens") or MAX_NEW_TOKENS),
        temperature if draws else 0.0,
        (until,) if isinstance(until, str) else tuple(until),
    )


def ended(text: str, until: Sequence[str]) -> str:
    """An answer: the text before the first of the ends in it."""
    places = [at for end in until if end and (at := text.find(end)) >= 0]
    return text[: min(places)].strip() if places else text


def png(visual: Any, where: str) -> bytes:
    """A task's picture as a file's bytes.

    Raises:
        SampleInvalid: it is something else, such as a video's path.
    """
    if not isinstance(visual, Image.Image):
        raise SampleInvalid(
            f"{where}: expected pictures, got {type(visual).__name__}; Decant's models see pictures alone"
        )
    sink = io.BytesIO()
    visual.convert("RGB").save(sink, "PNG")
    return sink.getvalue()
