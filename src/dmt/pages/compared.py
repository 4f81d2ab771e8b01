"""Runs side by side: what each came to, which settings differ, and their curves in the same plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dmt.pages.curves import Curve
from dmt.pages.overlaid import overlaid
from dmt.pages.page import Page, Row, Table
from dmt.pages.plots import Plot, Series, plot

PLACES = ("trainer.log_dir", "trainer.progress", "pretrain.output")
"""Settings that say where a run is and how it is watched, not what it does."""


@dataclass(frozen=True)
class Compared:
    """One of several runs.

    Attributes:
        name: by which it is told from the others.
        folder: where it is.
        record: what `run.json` says.
        settings: all of them, by dotted name.
        curves: those in its `metrics.csv`.
    """

    name: str
    folder: str
    record: Mapping[str, Any]
    settings: Mapping[str, Any]
    curves: Mapping[str, Curve]


def has_results(record: Mapping[str, Any]) -> bool:
    """Whether a run came to its end."""
    return any(record.get(name) for name in ("fidelity", "unrelated", "night"))


def measures(record: Mapping[str, Any]) -> dict[str, float]:
    """What a run came to, by name; of whatever task, what was not measured is not there."""
    found: dict[str, float] = {}
    for corpus, each in record.get("fidelity", {}).items():
        names = {"ratio": "perplexity ratio", "kl": "KL, nats/token", "agreement": "same top-1 token", "perplexity": "perplexity"}
        found |= {f"{corpus}: {title}": each[name] for name, title in names.items() if name in each}
        for name, title in (("recall", "facts recalled"), ("recall_unseen", "in unseen phrasings")):
            if said := each.get(name):
                found[f"{corpus}: {title}"] = said.get("student", said["teacher"])
    if used := list(record.get("slots", {}).values()):
        read, held, dead = (sum(u[name] for u in used) for name in ("read", "slots", "dead"))
        found |= {"slots": held, "slots read per token": read, "dead slots": dead}
    if stored := record.get("rows"):
        found["stored rows"] = sum(kept["rows"] for kept in stored.values())
    for kind, each in record.get("kinds", {}).items():
        found |= {f"{kind}: share kept": each["share"]} if each["share"] is not None else {}
        found[f"{kind}: answered rightly"] = each["recall_consolidated"]
    found |= {f"{corpus}: KL of unrelated text": each["kl"] for corpus, each in record.get("unrelated", {}).items()}
    if night := record.get("night"):
        found |= {f"night: {name}": value for name, value in night.items() if isinstance(value, int | float)}
    if size := record.get("bytes"):
        found["student in memory, MB"] = size["student"] / 1e6
    if seconds := record.get("seconds"):
        found |= {f"seconds to {part}": value for part, value in seconds.items()}
    return found


def differing(runs: Sequence[Compared]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs, by dotted name, with the value of each; and the commit where it differs."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in PLACES)
    found = {name: [run.settings.get(name) for run in runs] for name in names}
    found["commit"] = [str(run.record.get("commit", "unknown"))[:12] for run in runs]
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def number(value: float | None) -> str:
    """As it stands in a table."""
    if value is None:
        return "-"
    if value == round(value) and abs(value) != 1:  # a ratio of one is no count
        return f"{value:,.0f}"
    return f"{value:,.4f}" if abs(value) < 100 else f"{value:,.1f}"


def compared(runs: Sequence[Compared], shown: Mapping[str, list[str]]) -> Page:
    """The page of several runs; `shown` has the differing settings as words."""
    names = tuple(run.name for run in runs)
    rows = [
        Row(name, "", tuple(number(each.get(name)) for each in map(_measured, runs)))
        for name in dict.fromkeys(name for run in runs for name in _measured(run))
    ]
    settings = [Row(name, "", tuple(values), differs=True) for name, values in shown.items()]
    lead = f"{len(runs)} runs side by side: what each came to, which settings differ, and their curves in the same plots."
    page = Page(" · ".join(names), lead, "comparison")
    page.tables = [Table("What each came to", names, rows)]
    page.tables.append(Table("Settings that differ", names, settings, "" if settings else "None: it is the same run over again."))
    page.plots = [*overlaid({run.name: run.curves for run in runs}), *budgets(runs), *errors(runs)]
    page.places = [(run.name, run.folder) for run in runs]
    page.made = f"by dmt compare {' '.join(run.folder for run in runs)}"
    return page


def _measured(run: Compared) -> dict[str, float]:
    return measures(run.record)


def budgets(runs: Sequence[Compared]) -> list[Plot]:
    """KL against slots read, a plot for each corpus."""
    there = [(place, run, (run.record.get("budgets") or {}).get("points", [])) for place, run in enumerate(runs)]
    corpora = dict.fromkeys(corpus for _, _, points in there for point in points for corpus in point["corpora"])
    plots = []
    for corpus in corpora:
        series = []
        for place, run, points in there:
            some = [(p["read"], p["corpora"][corpus]["kl"], p["factor"]) for p in points if corpus in p["corpora"]]
            tips = [f"{run.name}: {factor:g} × k, {read:.1f} slots read, KL {kl:.4f}" for read, kl, factor in some]
            series += [Series(run.name, [r for r, _, _ in some], [kl for _, kl, _ in some], tips, place, place)] if some else []
        words = "Each finished student, read with other budgets than it was trained for."
        across = "slots read per token and layer"
        plots.append(
            plot(f"What reading more, or less, would give, {corpus}", across, "KL, nats per token", series, words, log="xy")
        )
    return plots


def errors(runs: Sequence[Compared]) -> list[Plot]:
    """The last measured error of each layer."""
    series = []
    for place, run in enumerate(runs):
        there = {int(name.rpartition("_")[2]): c for name, c in run.curves.items() if name.startswith("block_error/layer_")}
        if there:
            layers = sorted(there)
            last = [there[layer][1][-1] for layer in layers]
            tips = [f"{run.name}, layer {layer}: {error:.4f}" for layer, error in zip(layers, last, strict=True)]
            series.append(Series(run.name, layers, last, tips, place, place))
    return [plot("Error of each layer at the end", "layer", "share of variance", series)] if series else []
