"""The learning-rate schedule: linear warm-up, constant, half-cosine decay to zero."""

import math

from schemas.recipe import Schedule


def learning_rate(schedule: Schedule, step: int) -> float:
    """The rate of ``step`` (0-based)."""
    if step < schedule.warmup:
        return schedule.lr * (step + 1) / schedule.warmup
    left = schedule.steps - step
    if left <= schedule.decay:
        return schedule.lr * 0.5 * (1 - math.cos(math.pi * left / (schedule.decay + 1)))
    return schedule.lr
