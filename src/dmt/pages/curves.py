"""The curves of a run from its `metrics.csv` and from what was put aside when it was resumed."""

from __future__ import annotations

import csv
import math
from pathlib import Path

Curve = tuple[list[int], list[float]]
"""Steps, ascending, and what was logged at each."""
POINTS = 240
"""Points of a curve that are kept: as many as a plot of this size can show."""


def read_curves(run: Path) -> dict[str, Curve]:
    """Every curve of a run by its name, thinned to `POINTS`; none where nothing was logged.

    What a resumed run wrote counts more than what was written before it stopped. Values that are no finite numbers, and
    a line that was cut off, are left out.
    """
    found: dict[str, dict[int, float]] = {}
    for file in [*sorted(run.glob("metrics.before-*.csv")), run / "metrics.csv"]:
        try:
            _read(file, found)
        except (OSError, csv.Error):  # as far as it goes: a run's results do not depend on its curves
            continue
    return {name: _thinned(sorted(points.items())) for name, points in found.items()}


def _read(file: Path, found: dict[str, dict[int, float]]) -> None:
    with file.open(encoding="utf-8", errors="replace", newline="") as lines:
        for line in csv.DictReader(each.replace("\0", "") for each in lines):
            step = _number(line.get("step"))
            if step is None:
                continue
            for name, text in line.items():
                if name not in (None, "step", "epoch") and (value := _number(text)) is not None:
                    found.setdefault(name, {})[int(step)] = value


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _thinned(points: list[tuple[int, float]]) -> Curve:
    """Every so-manieth point, the last always: it is what the run came to."""
    every = -(-len(points) // POINTS)
    kept = points[::-1][::every][::-1]
    return [step for step, _ in kept], [value for _, value in kept]
