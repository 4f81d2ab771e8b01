"""Where numbers lie on an axis, and which of them are written beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

STEPS = (0.1, 0.2, 0.25, 0.5, 1.0, 2.0)
"""From one number to the next, in powers of ten below the length of the axis."""
WANTED = 6
MARGIN = 0.04
"""Of an axis, at each end."""


@dataclass(frozen=True)
class Axis:
    """A line from `low` to `high`, its logarithm where `log`, with the numbers that are written beside it."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def share(self, value: float) -> float:
        """How far along the axis `value` is, from 0 to 1."""
        low, high, value = (math.log(each) if self.log else each for each in (self.low, self.high, value))
        return (value - low) / (high - low)


def axis(numbers: Sequence[float], log: bool = False, ticks: Sequence[float] = ()) -> Axis:
    """One that has room for `numbers`; logarithmic if asked to and all are above nought, as others have no place there.

    Args:
        ticks: what is written beside it, if not round numbers.
    """
    least, most = min(numbers), max(numbers)
    log = log and least > 0
    if log:
        if least == most:
            least, most = least / 2, most * 2
        room = (most / least) ** MARGIN
        low, high = least / room, most * room
    else:
        room = MARGIN * (most - least) or abs(most) / 2 or 0.5
        low, high = least - room, most + room
    shown = tuple(ticks) or (_powers(low, high) if log else ())
    return Axis(low, high, log, shown if len(shown) > 1 or ticks else _round(low, high))


def written(number: float) -> str:
    """A number as it stands beside an axis."""
    if number and abs(number) >= 10_000:
        return f"{number / 1_000:g}k" if abs(number) < 1e6 else f"{number / 1e6:g}M"
    return f"{number:.4g}" if abs(number) >= 1e-4 or not number else f"{number:.0e}"


def _round(low: float, high: float) -> tuple[float, ...]:
    """Round numbers between the two, `WANTED` or a few more or less."""
    unit = 10.0 ** math.floor(math.log10(high - low))
    found = []
    for step in (each * unit for each in STEPS):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        found.append(tuple(float(f"{number * step:.12g}") for number in range(first, last + 1)))
    return min(found, key=lambda ticks: abs(len(ticks) - WANTED))


def _powers(low: float, high: float) -> tuple[float, ...]:
    """Powers of ten between the two; where there are few also two and five times them, where many not all."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = -(-(last - first) // 6)
    parts = (1, 2, 5) if last - first <= 3 else (1,)
    found = [float(f"{part}e{power}") for power in range(first, last + 1, every) for part in parts]
    return tuple(number for number in found if low <= number <= high)
