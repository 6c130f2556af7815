"""``decant generate``: one model's answer to a prompt with images, printed as it is made. No Ray.

The answer alone goes to stdout, so that it can be piped; who answers and how fast goes to stderr.
"""

import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from jobs.figures import human_bytes
from jobs.remote import INTERRUPTED
from jobs.speakers import Speaker
from pipeline.data.conversations import IMAGE, Conversation, Turn
from pipeline.data.encoding import Encoder
from pipeline.data.images import decode_image
from pipeline.data.processors import Processor, load_processor
from pipeline.data.templates import TEMPLATES
from pipeline.detokenizer import Detokenizer
from pipeline.generation import Generation, Prompt, stream
from pipeline.meter import refused
from pipeline.models import decoder, load_config
from pipeline.surgery import mixers
from schemas.errors import ConfigInvalid, MemoryExhausted, SampleInvalid, shown
from schemas.sections import Dtype

STDIN = "-"


@dataclass(frozen=True)
class Asked:
    """What the command line asks: a text (``-`` is what stdin gives), image files in their order, a system text."""

    prompt: str
    images: Sequence[Path]
    system: str | None


@dataclass
class Pace:
    """The times of an answer's tokens, in seconds of one clock."""

    begun: float
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0

    def count(self) -> None:
        """Notes a token."""
        self.last = time.perf_counter()
        self.first, self.tokens = self.first or self.last, self.tokens + 1

    def figures(self) -> list[str]:
        """How many tokens, the time to the first, and the rate of the others."""
        found = [f"{self.tokens} tokens"]
        if self.tokens:
            found.append(f"{self.first - self.begun:.3g} s to the first")
        if self.tokens > 1:
            found.append(f"{(self.tokens - 1) / (self.last - self.first):.3g} tokens/s after it")
        return found


def generate(speaker: Speaker, asked: Asked, how: Generation, dtype: Dtype | None) -> int:
    """Answers on stdout; returns the exit code. All that can be refused is refused before weights are read.

    Raises:
        ConfigInvalid: the model cannot be asked like that.
        SampleInvalid: prompt or images cannot be used.
        BackendUnavailable: a backend was named that cannot run here.
        MemoryExhausted: model or answer do not fit the device.
    """
    processor = load_processor(speaker.reads)
    prompt = _encode(asked, speaker, processor)
    room = _room(speaker, prompt)
    kind: Dtype = dtype or ("bfloat16" if speaker.device.type == "cuda" else "float32")
    _tell(f"{speaker.name}: loading in {kind} on {speaker.device}")
    try:
        model = speaker.load(getattr(torch, kind), speaker.device)
        _tell(f"{_facts(model)}; prompt: {len(prompt.ids)} tokens, images: {len(prompt.images)}")
        shortened = replace(how, max_new_tokens=min(how.max_new_tokens, room))
        pace, status = _answer(model, processor, prompt, shortened)
    except RuntimeError as error:
        if not refused(error):
            raise
        raise MemoryExhausted(
            f"generate: {speaker.name} in {kind} does not fit the memory of {speaker.device} with a prompt of "
            f"{len(prompt.ids)} tokens; take a smaller type (--dtype bfloat16), prompt or --max-new-tokens, or a "
            "larger device"
        ) from None
    _tell(", ".join([*pace.figures(), *_peak(speaker.device), *_ending(pace.tokens, how, room, status)]))
    return status


def _encode(asked: Asked, speaker: Speaker, processor: Processor) -> Prompt:
    images = tuple(_image(path) for path in asked.images)
    if images and processor.image_token_id is None:
        raise ConfigInvalid(f"--image: {speaker.name} reads text alone; leave out --image, or ask another model")
    if processor.template is None and speaker.template == "own":
        raise ConfigInvalid(
            f"generate: {speaker.name} ships no chat template; name the one that it was trained with by --template: "
            f"{', '.join(TEMPLATES)}"
        )
    conversation = Conversation("generate", "--prompt", images, _turns(asked, len(images)), {})
    # nothing is cut: what the model has no positions for is refused
    return Prompt(Encoder(processor, sys.maxsize, speaker.template).prompt_ids(conversation, images), images)


def _turns(asked: Asked, images: int) -> tuple[Turn, ...]:
    """What the system and the user say; the images stand first unless the prompt says itself where they are."""
    text = _text(_stdin() if asked.prompt == STDIN else asked.prompt, "--prompt")
    mentions = text.count(IMAGE)
    if mentions and mentions != images:
        raise SampleInvalid(
            f"--prompt: {mentions} {IMAGE} placeholders for {images} images (--image); give as many of one as of the "
            "other, or no placeholder: the images then stand before the text"
        )
    user = Turn("user", text if mentions else f"{IMAGE}\n" * images + text)
    if asked.system is None:
        return (user,)
    if IMAGE in asked.system:
        raise SampleInvalid(f"--system: {IMAGE} may stand in --prompt alone")
    return (Turn("system", _text(asked.system, "--system")), user)


def _image(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        decode_image(data)
    except OSError as error:
        raise SampleInvalid(f"--image {shown(str(path))}: {error.strerror or error}") from None
    except SampleInvalid as error:
        raise SampleInvalid(f"--image {shown(str(path))}: {error}") from None
    return data


def _stdin() -> str:
    try:
        # a shell's line end is no part of the question
        return sys.stdin.buffer.read().decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise SampleInvalid(f"--prompt -: stdin: expected UTF-8; byte {error.start} is not") from None


def _text(text: str, option: str) -> str:
    if not text.strip():
        raise SampleInvalid(f"{option}: has no text; say something, or `-` as --prompt to read it from stdin")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # how Python keeps an argument's bytes that are no text
        raise SampleInvalid(f"{option}: character {error.start} is no text in this terminal's encoding") from None
    return text


def _room(speaker: Speaker, prompt: Prompt) -> int:
    """How many tokens the model has positions for after the prompt."""
    text = load_config(speaker.reads, student=True).get_text_config()
    positions: int = getattr(text, "max_position_embeddings", None) or sys.maxsize
    if len(prompt.ids) >= positions:
        raise SampleInvalid(
            f"--prompt: is {len(prompt.ids)} tokens with its {len(prompt.images)} images, and {speaker.name} has "
            f"{positions} positions for prompt and answer; shorten it, or give fewer images"
        )
    return positions - len(prompt.ids)


def _facts(model: PreTrainedModel) -> str:
    """How large the model is, and how much of it is Mamba-2."""
    found, size = mixers(model), sum(p.numel() for p in model.parameters())
    facts = f"{size / 1e9:.3g} B parameters" if size >= 1e9 else f"{size / 1e6:.3g} M parameters"
    if not found:
        return facts
    layers: int = len(decoder(model).layers)  # type: ignore[arg-type]
    return f"{facts}, {len(found)} of {layers} layers Mamba-2 ({next(iter(found.values())).ops.backend})"


def _answer(model: PreTrainedModel, processor: Processor, prompt: Prompt, how: Generation) -> tuple[Pace, int]:
    """Writes the answer, what is certain of it at once; Ctrl-C ends it where it is."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    pace, said = Pace(time.perf_counter()), Detokenizer(processor.tokenizer)
    try:
        with closing(stream(model, processor, prompt, how)) as tokens:
            for token in tokens:
                pace.count()
                _write(said.add(token))
        _write(said.end())
    except KeyboardInterrupt:
        return pace, INTERRUPTED
    finally:
        with suppress(BrokenPipeError):  # the reader has gone, which the first write has told
            _write("\n")
    return pace, 0


def _write(text: str) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def _tell(text: str) -> None:
    print(f"generate: {text}", file=sys.stderr, flush=True)


def _peak(device: torch.device) -> list[str]:
    """The largest sum of the allocator; torch does not count a CPU's memory."""
    return [f"peak {human_bytes(torch.cuda.max_memory_allocated(device))}"] if device.type == "cuda" else []


def _ending(tokens: int, how: Generation, room: int, status: int) -> list[str]:
    """Why the answer is not whole, where it is not: the end token would have been one of the number."""
    if status == INTERRUPTED:
        return ["stopped by Ctrl-C"]
    if tokens < min(how.max_new_tokens, room):
        return []
    return ["cut at --max-new-tokens" if how.max_new_tokens <= room else "cut where the model's positions end"]
