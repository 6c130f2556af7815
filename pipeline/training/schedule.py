"""The learning-rate schedule: linear warm-up, constant, half-cosine decay to zero."""

import math

from schemas.config import Phase


def learning_rate(phase: Phase, step: int) -> float:
    """The rate of ``step`` (0-based) of a phase."""
    if step < phase.warmup_steps:
        return phase.lr * (step + 1) / phase.warmup_steps
    left = phase.steps - step
    if left <= phase.decay_steps:
        return phase.lr * 0.5 * (1 - math.cos(math.pi * left / (phase.decay_steps + 1)))
    return phase.lr
