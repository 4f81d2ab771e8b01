"""The curves of runs: read from their `metrics.csv`, and drawn for one run or for several."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from dmt.report.svg import Plot, Series, draw_plot

Curve = tuple[list[int], list[float]]  # ascending steps, and the value at each
MAX_POINTS = 240  # points of a curve; a plot of this size cannot show more
MAX_TIPS = 60  # points up to which each has a tooltip
MAX_LAYER_TICKS = 12  # layers up to which each has its own tick
FVU_PREFIX = "val/fvu/layer_"

# Curves that are plotted, by name or pattern: title, y axis, and which axes are logarithmic.
CURVE_PLOTS = {
    "train/layerwise_loss": ("Layer-wise training loss", "loss", "y"),
    "train/loss": ("Training loss", "loss", "y"),
    "train/kl_new": ("KL on new facts while training", "KL, nats per token", "y"),
    "train/kl_replay": ("KL on replayed text while training", "KL, nats per token", "y"),
    "train/kl_unrelated": ("KL on unrelated text while training", "KL, nats per token", "y"),
    "val/benefit_retained": ("Benefit of the context retained", "share", ""),
    "val/*/kl": ("KL from the teacher on validation text, {}", "KL, nats per token", "y"),
    "val/*/perplexity": ("Perplexity on validation text, {}", "perplexity", "y"),
}


def read_curves(run_dir: Path) -> dict[str, Curve]:
    """Return every curve of a run by name, thinned to `MAX_POINTS`; empty if nothing was logged.

    Values logged after a resume replace those logged before at the same step. Values that are not
    finite, and incomplete lines, are left out.
    """
    values_by_name: dict[str, dict[int, float]] = {}
    for path in [*sorted(run_dir.glob("metrics.before-*.csv")), run_dir / "metrics.csv"]:
        try:
            _read_metrics_file(path, values_by_name)
        except (OSError, csv.Error):  # the results of a run do not depend on its curves
            continue
    return {name: _thin_points(sorted(points.items())) for name, points in values_by_name.items()}


def _read_metrics_file(path: Path, values_by_name: dict[str, dict[int, float]]) -> None:
    with path.open(encoding="utf-8", errors="replace", newline="") as csv_file:
        for record in csv.DictReader(csv_line.replace("\0", "") for csv_line in csv_file):
            step = _parse_finite(record.get("step"))
            if step is None:
                continue
            for name, text in record.items():
                if name in (None, "step", "epoch"):
                    continue
                value = _parse_finite(text)
                if value is not None:
                    values_by_name.setdefault(name, {})[int(step)] = value


def _parse_finite(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _thin_points(points: list[tuple[int, float]]) -> Curve:
    """Keep every N-th point, and always the last, which is the result of the run."""
    stride = -(-len(points) // MAX_POINTS)
    thinned = points[::-1][::stride][::-1]
    return [step for step, _ in thinned], [value for _, value in thinned]


def overlay_curves(runs: Mapping[str, Mapping[str, Curve]]) -> list[Plot]:
    """Return a plot for each curve of `CURVE_PLOTS` that any run has.

    Args:
        runs: curves of each run by its name; the name is empty where there is only one run.
    """
    plots = []
    for pattern, (title, y_label, log_axes) in CURVE_PLOTS.items():
        names = dict.fromkeys(
            name for curves in runs.values() for name in curves if fnmatchcase(name, pattern)
        )
        for name in names:
            series = [
                _make_series(run_name, curves[name], index)
                for index, (run_name, curves) in enumerate(runs.items())
                if name in curves
            ]
            title_text = title.format(name.removeprefix("val/").rpartition("/")[0])
            plots.append(draw_plot(title_text, "step", y_label, series, log_axes=log_axes))
    return plots


def _make_series(run_name: str, curve: Curve, index: int) -> Series:
    x, y = curve
    tips: Sequence[str] = ()
    if len(x) <= MAX_TIPS:
        tips = [
            f"{run_name} step {step}: {value:.4f}".strip() for step, value in zip(x, y, strict=True)
        ]
    return Series(run_name, x, y, tips, index, index)


def get_layer_errors(curves: Mapping[str, Curve]) -> dict[int, Curve]:
    """Return the curve of each layer's error (fraction of variance unexplained), by layer."""
    return {
        int(name.removeprefix(FVU_PREFIX)): curve
        for name, curve in sorted(curves.items(), key=lambda item: (len(item[0]), item[0]))
        if name.startswith(FVU_PREFIX)
    }


def choose_layer_ticks(layers: Sequence[int]) -> Sequence[int]:
    """Return which layers have a tick: all, or every N-th of many."""
    return layers[:: max(1, -(-len(layers) // MAX_LAYER_TICKS))]
