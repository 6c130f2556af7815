"""Measures one model's generation, point by point: medians over repeats beside what the model's bytes allow.

A point that the device has no memory for is a result too: it has the reason and no times.
"""

import gc
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.decoding.timing import ENGINES, Decoded, Run, random_prompts
from pipeline.roofline import Footprint
from schemas.sections import Dtype

OUT_OF_MEMORY = "out of memory"
# How torch says it of a CPU.
REFUSALS = ("not enough memory", "can't allocate memory")


@dataclass(frozen=True)
class BenchSettings:
    """What is measured: every context (prompt tokens) at every batch by every engine, ``repeats`` times."""

    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    engines: tuple[str, ...]
    new_tokens: int
    repeats: int
    dtype: Dtype
    seed: int = 0


@dataclass(frozen=True)
class Meter:
    """Measures one model; ``bandwidth`` is the device's in bytes a second, ``memory`` all its bytes."""

    who: str
    model: PreTrainedModel
    bytes: Footprint
    settings: BenchSettings
    bandwidth: float
    memory: int

    def all(self) -> Iterator[dict[str, Any]]:
        """Every point, one after another; those out of memory too."""
        gc.freeze()  # what is here stays: looking through millions of objects before each run would take the time
        try:
            for place in product(self.settings.batches, self.settings.contexts, self.settings.engines):
                batch, context, engine = place
                yield self.point(engine, batch, context)
        finally:
            gc.unfreeze()

    def point(self, engine: str, batch: int, context: int) -> dict[str, Any]:
        """One point: what was measured, and what the bytes allow."""
        steps, formula = self.settings.new_tokens - 1, self.needs(batch, context)
        allowed = self.bytes.tokens_per_second(batch, context, self.bandwidth, steps)
        found = self._measured(engine, batch, context, formula)
        speed = found["tokens_per_second"]
        return {
            "model": self.who,
            "engine": engine,
            "batch": batch,
            "context": context,
            "new_tokens": self.settings.new_tokens,
            **found,
            "roofline_tokens_per_second": allowed,
            "roofline_share": None if speed is None else speed / allowed,
            "formula_bytes": formula,
        }

    def needs(self, batch: int, context: int) -> int:
        """Bytes of weights, keys, values and states once all tokens are there."""
        return self.bytes.memory_bytes(batch, context + self.settings.new_tokens)

    def _measured(self, engine: str, batch: int, context: int, formula: int) -> dict[str, Any]:
        if formula > self.memory:  # on a CPU the system would end this process, not refuse
            return _nothing(f"{formula / 1e9:.1f} GB by the formula; the device has {self.memory / 1e9:.1f} GB")
        try:
            return self._timed(engine, batch, context)
        except RuntimeError as error:
            if not refused(error):
                raise
            reason = str(error).splitlines()[0]
        free(self.model.device)  # here, where the error no longer holds the frames that hold the tensors
        return _nothing(reason)

    def _timed(self, engine: str, batch: int, context: int) -> dict[str, Any]:
        run, cuda = ENGINES[engine](self.model), self.model.device.type == "cuda"
        prompts = random_prompts(self.model, batch, context, self.settings.seed)
        run(prompts, self.settings.new_tokens)  # whatever happens once: kernels are made, a step is captured
        if cuda:
            free(self.model.device)
            torch.cuda.reset_peak_memory_stats(self.model.device)
        runs = [self._once(run, prompts) for _ in range(self.settings.repeats)]
        peak = torch.cuda.max_memory_allocated(self.model.device) if cuda else None
        return {**_times(runs), "peak_bytes": peak, "error": None, "reason": None}

    def _once(self, run: Run, prompts: Tensor) -> Decoded:
        gc.collect()  # transformers' cache of a hybrid refers to itself, and would count as this run's
        return run(prompts, self.settings.new_tokens)


def _times(runs: Sequence[Decoded]) -> dict[str, Any]:
    """Medians over the runs, least and most; the rate is of all tokens but the first of each row."""
    count = runs[0].tokens.shape[0] * (runs[0].tokens.shape[1] - 1)
    first, rest = sorted(r.first for r in runs), sorted(r.rest for r in runs)
    seconds = statistics.median(rest)
    return {
        "seconds_to_first_token": statistics.median(first),
        "seconds_to_first_token_range": [first[0], first[-1]],
        "seconds": seconds,
        "tokens_per_second": count / seconds,
        "tokens_per_second_range": [count / rest[-1], count / rest[0]],
    }


def _nothing(reason: str) -> dict[str, Any]:
    names = ("seconds_to_first_token", "seconds_to_first_token_range", "seconds")
    rates = ("tokens_per_second", "tokens_per_second_range", "peak_bytes")
    return {**dict.fromkeys((*names, *rates)), "error": OUT_OF_MEMORY, "reason": reason}


def refused(error: RuntimeError) -> bool:
    """Whether an allocator said no, be it while a graph was captured, whose end raises an error of its own."""
    if isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in REFUSALS):
        return True
    return isinstance(error.__context__, RuntimeError) and refused(error.__context__)


def free(device: torch.device) -> None:
    """Gives back what no tensor needs any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def memory_of(device: torch.device) -> int:
    """All bytes of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
