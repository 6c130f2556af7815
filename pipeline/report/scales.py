"""Scales: from values to places in a drawing, with round numbers to label them by."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Labels of an axis that a phone has room for.
TICKS = 5


@dataclass(frozen=True)
class Scale:
    """Values from ``low`` to ``high`` at places from ``start`` to ``stop``; what lies outside stands at the end."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value."""
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return self.start + (at - low) / (high - low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round values on the scale: between two and about seven."""
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)


def spanning(
    values: Iterable[float], start: float, stop: float, *, log: bool = False, zero: bool = False
) -> Scale | None:
    """A scale over all the values that it can show, None where there are none.

    A logarithmic one leaves out what is not above 0; ``zero`` has a linear one begin at 0.
    """
    known = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not known:
        return None
    low, high = min(known), max(known)
    if log:
        low, high = (low / 1.5, high * 1.5) if high < 1.2 * low else (low / 1.1, high * 1.1)
        return Scale(low, high, start, stop, log=True)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    room = (high - low) or abs(high) or 1.0
    return Scale(low if zero and low == 0 else low - 0.06 * room, high + 0.06 * room, start, stop)


def _linear_ticks(low: float, high: float) -> list[float]:
    step = _step((high - low) / TICKS)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _step(rough: float) -> float:
    """The first of 1, 2, 2.5, 5 times a power of ten that is not below ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= rough * (1 - 1e-9))


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = _inside([f * 10.0**e for e in range(first, last + 1) for f in factors], low, high)
        if len(found) >= 3:
            return found[:: -(-len(found) // 7)]
    # less than a decade: the linear scale's numbers
    return _inside(_linear_ticks(low, high), low, high)


def _inside(ticks: Sequence[float], low: float, high: float) -> list[float]:
    return [t for t in ticks if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]


def brief(value: float) -> str:
    """A label of few characters: 0.002, 45, 1.2k, 3M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def powers_of_two(value: float) -> str:
    """A context's length as it is called: 512, 1k for 1,024, 64k."""
    whole = value / 1024
    return f"{whole:.0f}k" if value >= 1024 and whole == int(whole) else f"{value:,.0f}"


def percent(value: float) -> str:
    """A label for a proportion."""
    return f"{100 * value:.4g} %"
