"""Numbers with their units, as pages and terminals show them. None and NaN are a dash."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

Number = float | int | None
NOTHING = "-"


def missing(value: Number) -> bool:
    """Whether there is no number."""
    return value is None or not math.isfinite(value)


def seconds(value: Number) -> str:
    """Three digits in the unit that fits: 850 ms, 1.25 s, 12.3 s, 3 min 05 s, 1 h 02 min."""
    if value is None or missing(value):
        return NOTHING
    if value < 0.9995:
        return f"{_digits(value * 1000)} ms"
    if value < 119.95:
        return f"{_digits(value)} s"
    if value < 3599.5:
        return "{} min {:02} s".format(*divmod(round(value), 60))
    return "{:,} h {:02} min".format(*divmod(round(value / 60), 60))


def count(value: Number, unit: str = "") -> str:
    """1,234 with its unit."""
    return NOTHING if value is None or missing(value) else f"{value:,.0f} {unit}".strip()


def figure(value: Number, unit: str = "") -> str:
    """Three digits with the unit: 0.123, 12.3 tokens/s; whole above 100."""
    return NOTHING if value is None or missing(value) else f"{_digits(value)} {unit}".strip()


def share(value: Number) -> str:
    """0.253 as 25.3%."""
    return NOTHING if value is None or missing(value) else f"{value:.1%}"


def binary_bytes(value: Number) -> str:
    """Bytes in the unit that fits: 512 B, 1.50 KiB, 17.4 GiB."""
    if value is None or missing(value):
        return NOTHING
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{_digits(value)} {unit}"
        value /= 1024
    return f"{_digits(value)} TiB"


def stretches(numbers: Sequence[int]) -> list[str]:
    """Rising whole numbers with those that follow each other together: 0 to 4, 6."""
    breaks = [at for at, (one, other) in enumerate(pairwise(numbers), 1) if other != one + 1]
    runs = [numbers[first:last] for first, last in pairwise([0, *breaks, len(numbers)])]
    return [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]


def _digits(value: float) -> str:
    size = abs(value)
    if 0 < size < 0.001:
        return f"{value:.1e}"
    return f"{value:,.{0 if size >= 99.95 else 1 if size >= 9.995 else 2 if size >= 0.9995 else 3}f}"
