"""Runs side by side: what each came to, which settings differ, and their curves in the same plots.

The curves of a run from its `metrics.csv` and from what was put aside when it was resumed.

Curves of one run or of several in the same plots, whatever its task was.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dmt.report.html import HtmlRow, HtmlTable, Page
from dmt.report.svg import Plot, Series, draw_plot

Curve = tuple[list[int], list[float]]
"""Steps, ascending, and what was logged at each."""
MAX_POINTS = 240
"""Points of a curve that are kept: as many as a plot of this size can show."""


def read_curves(run_dir: Path) -> dict[str, Curve]:
    """Every curve of a run by its name, thinned to `POINTS`; none where nothing was logged.

    What a resumed run wrote counts more than what was written before it stopped. Values that are no finite numbers, and
    a line that was cut off, are left out.
    """
    values_by_name: dict[str, dict[int, float]] = {}
    for path in [*sorted(run_dir.glob("metrics.before-*.csv")), run_dir / "metrics.csv"]:
        try:
            _read_metrics_file(path, values_by_name)
        except (
            OSError,
            csv.Error,
        ):  # as far as it goes: a run's results do not depend on its curves
            continue
    return {name: _thin_points(sorted(points.items())) for name, points in values_by_name.items()}


def _read_metrics_file(path: Path, values_by_name: dict[str, dict[int, float]]) -> None:
    with path.open(encoding="utf-8", errors="replace", newline="") as csv_file:
        for record in csv.DictReader(csv_line.replace("\0", "") for csv_line in csv_file):
            step = _parse_finite(record.get("step"))
            if step is None:
                continue
            for name, text in record.items():
                if (
                    name not in (None, "step", "epoch")
                    and (value := _parse_finite(text)) is not None
                ):
                    values_by_name.setdefault(name, {})[int(step)] = value


def _parse_finite(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _thin_points(points: list[tuple[int, float]]) -> Curve:
    """Every so-manieth point, the last always: it is what the run came to."""
    stride = -(-len(points) // MAX_POINTS)
    thinned = points[::-1][::stride][::-1]
    return [step for step, _ in thinned], [value for _, value in thinned]


CURVE_PLOTS = {
    "layerwise/loss": ("First stage: layer by layer", "loss", "y"),
    "end_to_end/loss": ("Second stage: end to end", "loss", "y"),
    "consolidate/loss": ("What is learnt of the context", "loss", "y"),
    "consolidate/unrelated": ("What other text notices of it", "KL, nats per token", "y"),
    "consolidated/share": ("Share of the context's benefit that is kept", "share", ""),
    "loss": ("Training loss", "nats per token", "y"),
    "*/kl": ("Distance from the teacher, {}", "KL, nats per token", "y"),
    "*/perplexity": ("Perplexity on validation text, {}", "perplexity", "y"),
}
"""Curves that are worth a plot, by name or pattern: its title, what stands beside it, and which axes are logarithmic."""
MAX_TIPS = 60
"""Points up to which each says what it is."""


def overlay_curves(runs: Mapping[str, Mapping[str, Curve]]) -> list[Plot]:
    """A plot for each known curve that any run has; `runs` gives a run's curves by its name, `""` where there is but one."""
    plots = []
    for pattern, (title, y_label, log_axes) in CURVE_PLOTS.items():
        names = dict.fromkeys(
            name for curves in runs.values() for name in curves if fnmatchcase(name, pattern)
        )
        for name in (
            name
            for name in names
            if not (pattern == "*/kl" and name.startswith(("end_to_end/", "consolidate/")))
        ):
            series = []
            for index, (run_name, curves) in enumerate(runs.items()):
                if name not in curves:
                    continue
                x, y = curves[name]
                tips = (
                    [
                        f"{run_name} step {step}: {value:.4f}".strip()
                        for step, value in zip(x, y, strict=True)
                    ]
                    if len(x) <= MAX_TIPS
                    else ()
                )
                series.append(Series(run_name, x, y, tips, index, index))
            plots.append(
                draw_plot(
                    title.format(name.partition("/")[0]), "step", y_label, series, log_axes=log_axes
                )
            )
    return plots


IGNORED_SETTINGS = ("trainer.log_dir", "trainer.progress_bar", "pretrain.output")
"""Settings that say where a run is and how it is watched, not what it does."""


@dataclass(frozen=True)
class ComparedRun:
    """One of several runs.

    Attributes:
        name: by which it is told from the others.
        folder: where it is.
        record: what `run.json` says.
        settings: all of them, by dotted name.
        curves: those in its `metrics.csv`.
    """

    name: str
    run_dir: str
    record: Mapping[str, Any]
    settings: Mapping[str, Any]
    curves: Mapping[str, Curve]


def has_results(record: Mapping[str, Any]) -> bool:
    """Whether a run came to its end."""
    return any(record.get(name) for name in ("fidelity", "unrelated", "night"))


def collect_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """What a run came to, by name; of whatever task, what was not measured is not there."""
    metrics: dict[str, float] = {}
    for corpus, entry in record.get("fidelity", {}).items():
        titles = {
            "ppl_ratio": "perplexity ratio",
            "kl": "KL, nats/token",
            "top1_agreement": "same top-1 token",
            "perplexity": "perplexity",
        }
        metrics |= {
            f"{corpus}: {title}": entry[name] for name, title in titles.items() if name in entry
        }
        for name, title in (("recall", "facts recalled"), ("recall_unseen", "in unseen phrasings")):
            if recall := entry.get(name):
                metrics[f"{corpus}: {title}"] = recall.get("student", recall["teacher"])
    if slot_usage := list(record.get("slots", {}).values()):
        num_read, num_slots, num_dead = (
            sum(layer_usage[name] for layer_usage in slot_usage)
            for name in ("read", "slots", "dead")
        )
        metrics |= {"slots": num_slots, "slots read per token": num_read, "dead slots": num_dead}
    if rows_by_layer := record.get("rows"):
        metrics["stored rows"] = sum(layer_rows["rows"] for layer_rows in rows_by_layer.values())
    for kind, entry in record.get("kinds", {}).items():
        metrics |= {f"{kind}: share kept": entry["share"]} if entry["share"] is not None else {}
        metrics[f"{kind}: answered rightly"] = entry["recall_consolidated"]
    metrics |= {
        f"{corpus}: KL of unrelated text": entry["kl"]
        for corpus, entry in record.get("unrelated", {}).items()
    }
    if sleep_metrics := record.get("night"):
        metrics |= {
            f"night: {name}": value
            for name, value in sleep_metrics.items()
            if isinstance(value, int | float)
        }
    if sizes := record.get("bytes"):
        metrics["student in memory, MB"] = sizes["student"] / 1e6
    if seconds := record.get("seconds"):
        metrics |= {f"seconds to {phase}": value for phase, value in seconds.items()}
    return metrics


def find_differing_settings(runs: Sequence[ComparedRun]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs, by dotted name, with the value of each; and the commit where it differs."""
    names = dict.fromkeys(
        name for run in runs for name in run.settings if name not in IGNORED_SETTINGS
    )
    values_by_name = {name: [run.settings.get(name) for run in runs] for name in names}
    values_by_name["commit"] = [str(run.record.get("commit", "unknown"))[:12] for run in runs]
    return {
        name: values
        for name, values in values_by_name.items()
        if any(value != values[0] for value in values)
    }


def format_number(value: float | None) -> str:
    """As it stands in a table."""
    if value is None:
        return "-"
    if value == round(value) and abs(value) != 1:  # a ratio of one is no count
        return f"{value:,.0f}"
    return f"{value:,.4f}" if abs(value) < 100 else f"{value:,.1f}"


def build_comparison_page(
    runs: Sequence[ComparedRun], setting_texts: Mapping[str, list[str]]
) -> Page:
    """The page of several runs; `shown` has the differing settings as words."""
    names = tuple(run.name for run in runs)
    rows = [
        HtmlRow(
            name,
            "",
            tuple(format_number(metrics.get(name)) for metrics in map(_get_run_metrics, runs)),
        )
        for name in dict.fromkeys(name for run in runs for name in _get_run_metrics(run))
    ]
    settings = [
        HtmlRow(name, "", tuple(values), is_different=True)
        for name, values in setting_texts.items()
    ]
    summary = f"{len(runs)} runs side by side: what each came to, which settings differ, and their curves in the same plots."
    page = Page(" · ".join(names), summary, "comparison")
    page.tables = [HtmlTable("What each came to", names, rows)]
    page.tables.append(
        HtmlTable(
            "Settings that differ",
            names,
            settings,
            "" if settings else "None: it is the same run over again.",
        )
    )
    page.plots = [
        *overlay_curves({run.name: run.curves for run in runs}),
        *plot_budgets(runs),
        *plot_final_layer_errors(runs),
    ]
    page.locations = [(run.name, run.run_dir) for run in runs]
    page.provenance = f"by dmt compare {' '.join(run.run_dir for run in runs)}"
    return page


def _get_run_metrics(run: ComparedRun) -> dict[str, float]:
    return collect_metrics(run.record)


def plot_budgets(runs: Sequence[ComparedRun]) -> list[Plot]:
    """KL against slots read, a plot for each corpus."""
    points_by_run = [
        (index, run, (run.record.get("budgets") or {}).get("points", []))
        for index, run in enumerate(runs)
    ]
    corpora = dict.fromkeys(
        corpus for _, _, points in points_by_run for point in points for corpus in point["corpora"]
    )
    plots = []
    for corpus in corpora:
        series = []
        for index, run, points in points_by_run:
            corpus_points = [
                (entry["read"], entry["corpora"][corpus]["kl"], entry["factor"])
                for entry in points
                if corpus in entry["corpora"]
            ]
            tips = [
                f"{run.name}: {factor:g} × k, {num_read:.1f} slots read, KL {kl:.4f}"
                for num_read, kl, factor in corpus_points
            ]
            series += (
                [
                    Series(
                        run.name,
                        [x for x, _, _ in corpus_points],
                        [kl for _, kl, _ in corpus_points],
                        tips,
                        index,
                        index,
                    )
                ]
                if corpus_points
                else []
            )
        caption = "Each finished student, read with other budgets than it was trained for."
        x_label = "slots read per token and layer"
        plots.append(
            draw_plot(
                f"What reading more, or less, would give, {corpus}",
                x_label,
                "KL, nats per token",
                series,
                caption,
                log_axes="xy",
            )
        )
    return plots


def plot_final_layer_errors(runs: Sequence[ComparedRun]) -> list[Plot]:
    """The last measured error of each layer."""
    series = []
    for index, run in enumerate(runs):
        curve_by_layer = {
            int(name.rpartition("_")[2]): curve
            for name, curve in run.curves.items()
            if name.startswith("block_error/layer_")
        }
        if curve_by_layer:
            layers = sorted(curve_by_layer)
            final_errors = [curve_by_layer[layer][1][-1] for layer in layers]
            tips = [
                f"{run.name}, layer {layer}: {error:.4f}"
                for layer, error in zip(layers, final_errors, strict=True)
            ]
            series.append(Series(run.name, layers, final_errors, tips, index, index))
    return (
        [draw_plot("Error of each layer at the end", "layer", "share of variance", series)]
        if series
        else []
    )
