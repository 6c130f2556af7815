"""Figures as people read them."""

from datetime import datetime

UNITS = ("B", "kB", "MB", "GB", "TB")


def human_bytes(count: float) -> str:
    """Bytes with three digits and a decimal unit."""
    for unit in UNITS:
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"


def human_time(seconds: float) -> str:
    """Seconds, or hours where there are some."""
    return f"{seconds:.3g} s" if seconds < 360 else f"{seconds / 3600:,.3g} h"


def human_span(seconds: float) -> str:
    """A stretch of time in the unit in which people count it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def human_number(value: float) -> str:
    """Two decimals where they say something."""
    return "< 0.01" if 0 < value < 0.01 else f"{value:,.2f}" if value < 10 else f"{value:,.0f}"


def moment(seconds: float) -> str:
    """A time since the epoch as the local date and minute."""
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"
