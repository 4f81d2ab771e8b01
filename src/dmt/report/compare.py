"""Runs side by side: results grouped over seeds, the settings that differ, and their curves.

comparison = dmt.compare(["version_0", "version_1", "version_2"], by="memory.k")
print(comparison.to_markdown())
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from dmt.config import Config
from dmt.errors import UserError, format_value
from dmt.paths import find_run, quote_path
from dmt.report.curves import (
    Curve,
    choose_layer_ticks,
    get_layer_errors,
    overlay_curves,
    read_curves,
)
from dmt.report.html import Page
from dmt.report.results import Result, collect_metrics, collect_results, format_number, has_results
from dmt.report.svg import Plot, Series, draw_plot
from dmt.report.tables import Row, Table
from dmt.training.run_dir import read_record

# Settings that say where a run is stored and how it is watched, not what it does.
IGNORED_SETTINGS = frozenset(
    {
        "trainer.log_dir",
        "trainer.run_name",
        "trainer.progress_bar",
        "trainer.loggers",
    }
)
SEED = "seed"
# Settings that change on what text a run is measured.
TEST_SETTINGS = ("data.corpora", "data.field", "data.test_tokens", "data.seq_len")
NOT_COMPARABLE = "†"
OTHER_LENGTH = "‡"  # trained on more or fewer tokens
PERPLEXITY_TOLERANCE = 1e-3  # relative; more means that the teacher read other text


@dataclass(frozen=True)
class ComparedRun:
    """One of several runs.

    Attributes:
        name: a name that no other of the runs has.
        run_dir: its folder.
        record: contents of its `run.json`.
        settings: all settings by dotted name.
        curves: the curves in its `metrics.csv`.
    """

    name: str
    run_dir: str
    record: Mapping[str, Any]
    settings: Mapping[str, Any]
    curves: Mapping[str, Curve]

    @cached_property
    def results(self) -> dict[str, Result]:
        """What the run measured, by key."""
        return {
            result.key: result
            for result in collect_results(self.record)
            if result.only_in != "run" and isinstance(result.value, int | float)
        }

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The numbers that the run measured, by key."""
        return collect_metrics(self.record)


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ only by their seed, or that agree in the settings of `by`.

    Attributes:
        name: name of the only run, or the settings that tell the group from the others.
        runs: the runs.
        problem: why results are not comparable with those of the first group; empty if they are.
        has_same_length: whether they are trained on as many tokens as the first group, or are not
            comparable anyway.
    """

    name: str
    runs: tuple[ComparedRun, ...]
    problem: str = ""
    has_same_length: bool = True

    @property
    def is_comparable(self) -> bool:
        """Whether they are measured on the same text and against the same teacher."""
        return not self.problem

    @property
    def label(self) -> str:
        """The name, with the number of runs and marks where results are not comparable."""
        seeds = f" ({len(self.runs)} runs)" if len(self.runs) > 1 else ""
        mark = "" if self.is_comparable else f" {NOT_COMPARABLE}"
        return f"{self.name}{seeds}{mark}{'' if self.has_same_length else f' {OTHER_LENGTH}'}"

    def values(self, key: str) -> list[float]:
        """Return the values of a metric in the runs that have it."""
        return [run.metrics[key] for run in self.runs if key in run.metrics]

    def mean(self, key: str) -> float | None:
        """Return the mean of a metric over the runs; None if none has it."""
        values = self.values(key)
        return mean(values) if values else None

    def std(self, key: str) -> float | None:
        """Return the sample standard deviation of a metric; None with fewer than two runs."""
        values = self.values(key)
        return stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


@dataclass(frozen=True)
class Comparison:
    """Several runs compared; what `dmt.compare` returns.

    Attributes:
        runs: the runs, in the given order.
        groups: the runs in groups, over which means and standard deviations are taken.
        config_diff: settings that differ between runs, by dotted name, with the value in each run;
            the commit among them where it differs.
        warnings: why results are not comparable, one sentence each.
    """

    runs: tuple[ComparedRun, ...]
    groups: tuple[RunGroup, ...]
    config_diff: Mapping[str, Sequence[Any]]
    warnings: Sequence[str] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, Result]:
        """The metrics that any run has, by key, with an example of each."""
        examples: dict[str, Result] = {}
        for run in self.runs:
            examples |= {key: value for key, value in run.results.items() if key not in examples}
        return examples

    def results_table(self, metrics: Sequence[str] | None = None) -> Table:
        """Return a table with a row for each group and a column for each metric.

        Args:
            metrics: keys of the metrics; None means all.

        Raises:
            UserError: no run has such a metric.
        """
        examples = self.metrics
        keys = list(examples) if metrics is None else list(metrics)
        for key in keys:
            if key not in examples:
                raise UserError(f"metrics: no run has {key}; accepted are {', '.join(examples)}")
        best = {key: self._best_groups(examples[key]) for key in keys}
        rows = [
            Row(
                group.label,
                tuple(_format_cell(group, examples[key]) for key in keys),
                values=tuple(group.mean(key) for key in keys),
                best=frozenset(column for column, key in enumerate(keys) if index in best[key]),
            )
            for index, group in enumerate(self.groups)
        ]
        caption = " ".join(
            [
                *(
                    ["Mean ± sample standard deviation over runs."]
                    if any(len(group.runs) > 1 for group in self.groups)
                    else []
                ),
                *self.warnings,
            ]
        )
        return Table("", tuple(examples[key].name for key in keys), rows, caption, "run")

    def paper_table(self, metrics: Sequence[str] | None = None) -> Table:
        """Return `results_table` with the metrics for a paper: without times and slot counts."""
        keys = metrics
        if keys is None:
            keys = [
                key
                for key in self.metrics
                if not key.startswith(("seconds/", "num_slots", "slot_transfer/seconds"))
            ]
        return self.results_table(keys)

    def settings_table(self) -> Table:
        """Return a table with a row for each setting that differs and a column for each run."""
        rows = [
            Row(name, tuple(map(format_value, values)), values=tuple(values), is_different=True)
            for name, values in self.config_diff.items()
        ]
        return Table(
            "Settings that differ",
            tuple(run.name for run in self.runs),
            rows,
            "" if rows else "None: the runs have the same settings.",
            "setting",
        )

    def to_markdown(self, metrics: Sequence[str] | None = None) -> str:
        """Return the results as a Markdown table, the best value of each column in bold."""
        return self.paper_table(metrics).to_markdown()

    def to_latex(self, metrics: Sequence[str] | None = None) -> str:
        """Return the results as a LaTeX table (booktabs), the best of each column in bold."""
        return self.paper_table(metrics).to_latex()

    def to_csv(self) -> str:
        """Return a line for each run: group, settings that differ, unrounded metrics, problem."""
        groups = {run.name: group for group in self.groups for run in group.runs}
        settings, metrics = list(self.config_diff), list(self.metrics)
        rows = [
            Row(
                run.name,
                (),
                values=(
                    groups[run.name].name,
                    *(format_value(self.config_diff[name][index]) for name in settings),
                    *(run.metrics.get(key) for key in metrics),
                    groups[run.name].problem,
                ),
            )
            for index, run in enumerate(self.runs)
        ]
        return Table(
            "", ("group", *settings, *metrics, "problem"), rows, label_column="run"
        ).to_csv()

    def to_dict(self) -> dict[str, Any]:
        """Return runs and groups as dictionaries and lists that JSON can hold."""
        runs = [
            {
                "name": run.name,
                "run_dir": run.run_dir,
                "metrics": run.metrics,
                "config_diff": {name: values[index] for name, values in self.config_diff.items()},
            }
            for index, run in enumerate(self.runs)
        ]
        groups = [
            {
                "name": group.name,
                "runs": [run.name for run in group.runs],
                "is_comparable": group.is_comparable,
                "problem": group.problem,
                "metrics": {
                    key: {"mean": group.mean(key), "std": group.std(key)}
                    for key in self.metrics
                    if group.values(key)
                },
            }
            for group in self.groups
        ]
        return {"runs": runs, "groups": groups, "warnings": list(self.warnings)}

    def to_page(self) -> Page:
        """Return the HTML page: tables, and the curves of all runs in the same plots."""
        varied = ", ".join(name for name in self.config_diff if name not in (SEED, "commit"))
        title = f"Comparison by {varied}" if varied else "Runs with the same settings"
        steps = sorted({_count_steps(run.settings) for run in self.runs})
        teachers = dict.fromkeys(str(run.settings.get("teacher")) for run in self.runs)
        summary = (
            f"{len(self.runs)} runs: {', '.join(run.name for run in self.runs)}. Teacher "
            f"{', '.join(teachers)}; {' or '.join(f'{count:,}' for count in steps)} steps."
        )
        page = Page(title, summary, "comparison", notes=list(self.warnings))
        results = self.results_table()
        page.tables = [
            Table("Results", *_transposed_fields(results)),
            self.settings_table(),
        ]
        page.plots = [
            *overlay_curves({run.name: run.curves for run in self.runs}),
            *plot_final_layer_errors(self.runs),
        ]
        page.locations = [(run.name, run.run_dir) for run in self.runs]
        page.provenance = f"by dmt compare {shlex.join(run.run_dir for run in self.runs)}"
        return page

    def __repr__(self) -> str:
        return (
            f"Comparison({len(self.runs)} runs in {len(self.groups)} groups)\n"
            f"{self.results_table().transpose().to_text()}"
        )

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return str(self.results_table().transpose().to_html())

    def _best_groups(self, result: Result) -> set[int]:
        """Return which groups have the best mean; none where there is nothing to choose."""
        means = {
            index: value
            for index, group in enumerate(self.groups)
            if group.is_comparable and (value := group.mean(result.key)) is not None
        }
        if not result.goal or len(set(means.values())) < 2:
            return set()
        best = (min if result.goal == "min" else max)(means.values())
        return {index for index, value in means.items() if value == best}


def compare(runs: Sequence[str | Path], by: str | Sequence[str] | None = None) -> Comparison:
    """Compare finished runs.

    Runs that differ only by their seed form a group, over which mean and standard deviation are
    taken. Groups that are measured on other test text than the first, or against another teacher,
    are marked with `†`, those that are trained on more or fewer tokens with `‡`.

    Args:
        runs: folders of runs, or names or numbers of runs in `lightning_logs`; two or more.
        by: settings by which runs are grouped instead, such as `memory.k`; whatever else differs
            counts as repetition.

    Raises:
        UserError: there are fewer than two runs, one has no results, two are the same, or `by`
            names no setting.
    """
    loaded = _load_runs([str(run) for run in runs])
    keys = [by] if isinstance(by, str) else list(by or ())
    for key in keys:
        if not any(key in run.settings for run in loaded):
            raise UserError(f"by={key} is not a setting; dmt config --list shows all settings")
    return _group_runs(loaded, keys)


def _group_runs(runs: Sequence[ComparedRun], by: Sequence[str]) -> Comparison:
    config_diff = find_differing_settings(runs)
    keys = list(by) or [name for name in config_diff if name not in (SEED, "commit")]
    members: dict[tuple[str, ...], list[ComparedRun]] = {}
    for run in runs:
        setting_texts = tuple(format_value(run.settings.get(key)) for key in keys)
        members.setdefault(setting_texts, []).append(run)
    reference = runs[0]
    groups, warnings, first_lengths = [], [], ""
    for setting_texts, group_runs in members.items():
        if len(group_runs) == 1 and not by:
            name = group_runs[0].name
        else:
            name = (
                ", ".join(f"{key}={text}" for key, text in zip(keys, setting_texts, strict=True))
                or "all runs"
            )
        problem = next(filter(None, (_explain_mismatch(reference, run) for run in group_runs)), "")
        if problem:
            warnings.append(f"{NOT_COMPARABLE} {name} is not comparable with the first: {problem}.")
        lengths = _format_lengths(group_runs)
        first_lengths = first_lengths or lengths
        has_same_length = bool(problem) or lengths == first_lengths
        if not has_same_length:
            warnings.append(
                f"{OTHER_LENGTH} {name} is trained on {lengths} tokens, the first on "
                f"{first_lengths}."
            )
        groups.append(RunGroup(name, tuple(group_runs), problem, has_same_length))
    warnings += _find_test_differences(runs)
    return Comparison(tuple(runs), tuple(groups), config_diff, warnings)


def _explain_mismatch(reference: ComparedRun, run: ComparedRun) -> str:
    """Return why results of the two are not comparable; empty if they are."""
    texts = _identify_texts(reference, run)
    differing = [
        f"{name} {format_value(run.settings.get(name))} instead of "
        f"{format_value(reference.settings.get(name))}"
        for name in TEST_SETTINGS
        if run.settings.get(name) != reference.settings.get(name)
        and not (texts and name == "data.corpora")
    ]
    names = dict.fromkeys(name for identities in texts for name in identities)
    differing += [
        f"the text of {name}" for name in names if texts[0].get(name) != texts[1].get(name)
    ]
    problems = [f"measured on other test text ({'; '.join(differing)})"] if differing else []
    weights = [_get_weights(compared) for compared in (reference, run)]
    if None not in weights and weights[0] != weights[1]:
        problems.append("measured against another teacher (its weights differ)")
    return " and ".join(problems)


def _get_weights(run: ComparedRun) -> str | None:
    """Return the digest of the teacher's weights; runs of earlier versions have none."""
    return run.record.get("model", {}).get("weights")


def _identify_texts(*runs: ComparedRun) -> list[dict[str, Any]]:
    """Return what identifies the corpora of each run, by name; nothing where one lacks it.

    With one seed it is a digest. Files are split by the seed, so with several it is their size.
    """
    if not all(run.record.get("corpora") for run in runs):
        return []
    has_one_seed = len({run.settings.get(SEED) for run in runs}) == 1
    keys = ("digest",) if has_one_seed else ("documents", "characters")
    return [
        {corpus["name"]: [corpus.get(key) for key in keys] for corpus in run.record["corpora"]}
        for run in runs
    ]


def _format_lengths(runs: Sequence[ComparedRun]) -> str:
    """Return the tokens that runs are trained on."""
    lengths = {
        _count_steps(run.settings)
        * int(run.settings.get("data.batch_size") or 0)
        * int(run.settings.get("data.seq_len") or 0)
        for run in runs
    }
    return " or ".join(f"{length:,}" for length in sorted(lengths))


def _find_test_differences(runs: Sequence[ComparedRun]) -> list[str]:
    """Return notes on teachers and test text that differ although the settings agree."""
    teachers = {_get_weights(run) or format_value(run.settings.get("teacher")) for run in runs}
    if len(teachers) > 1:
        return ["KL, agreement and ratio are relative to the teacher of each run; teachers differ."]
    perplexities: dict[tuple[Any, ...], list[float]] = {}
    for run in runs:
        test_settings = tuple(format_value(run.settings.get(name)) for name in TEST_SETTINGS)
        for corpus, scores in run.record.get("fidelity", {}).items():
            if "teacher_perplexity" in scores:
                key = (corpus, *test_settings)
                perplexities.setdefault(key, []).append(scores["teacher_perplexity"])
    differing = dict.fromkeys(
        key[0]
        for key, values in perplexities.items()
        if max(values) - min(values) > PERPLEXITY_TOLERANCE * min(values)
    )
    return [
        f"The test text of {corpus} differs between runs, as the teacher's perplexity shows: "
        "files are split by the seed."
        for corpus in differing
    ]


def _format_cell(group: RunGroup, result: Result) -> str:
    value, deviation = group.mean(result.key), group.std(result.key)
    if value is None:
        return "-"
    spec = result.spec
    if deviation is not None and spec == ",.0f" and value < 100:
        spec = ",.1f"
    text = format_number(value, spec)
    return text if deviation is None else f"{text} ± {format_number(deviation, spec)}"


def _transposed_fields(table: Table) -> tuple[tuple[str, ...], Sequence[Row], str]:
    transposed = table.transpose()
    return transposed.columns, transposed.rows, transposed.caption


def _count_steps(settings: Mapping[str, Any]) -> int:
    return sum(
        int(settings.get(f"stages.{name}") or 0) for name in ("layerwise_steps", "end_to_end_steps")
    )


def find_differing_settings(runs: Sequence[ComparedRun]) -> dict[str, list[Any]]:
    """Return the settings that are not the same in all runs, with the value in each run.

    `commit` is among them where it differs. Names of files and of the run are not.
    """
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


def plot_final_layer_errors(runs: Sequence[ComparedRun]) -> list[Plot]:
    """Return a plot of the last measured error of each layer; none if no run has measured it."""
    series: list[Series] = []
    all_layers: set[int] = set()
    for index, run in enumerate(runs):
        errors_by_layer = get_layer_errors(run.curves)
        if errors_by_layer:
            layers = list(errors_by_layer)
            all_layers.update(layers)
            final_errors = [errors_by_layer[layer][1][-1] for layer in layers]
            tips = [
                f"{run.name}, layer {layer}: {error:.4f}"
                for layer, error in zip(layers, final_errors, strict=True)
            ]
            series.append(Series(run.name, layers, final_errors, tips, index, index))
    if not series:
        return []
    ticks = choose_layer_ticks(sorted(all_layers))
    title = "Error of each layer after training"
    return [draw_plot(title, "layer", "fraction of variance unexplained", series, ticks=ticks)]


def _load_runs(names: Sequence[str]) -> list[ComparedRun]:
    if len(names) < 2:
        raise UserError(
            f"compare takes two runs or more, got {len(names)}; for example: "
            "dmt compare version_0 version_1"
        )
    folders = [find_run(name) for name in names]
    names_by_folder: dict[Path, str] = {}
    for name, folder in zip(names, folders, strict=True):
        if (resolved := folder.resolve()) in names_by_folder:
            raise UserError(
                f"{name} and {names_by_folder[resolved]} are the same run, {folder}; "
                "name different runs"
            )
        names_by_folder[resolved] = name
    is_ambiguous = len({folder.name for folder in folders}) < len(folders)
    return [_load_run(folder, str(folder) if is_ambiguous else folder.name) for folder in folders]


def _load_run(folder: Path, name: str) -> ComparedRun:
    record = read_record(folder)
    if not isinstance(record, dict) or not has_results(record):
        raise UserError(
            f"{folder} has no results yet; resume it: dmt distill --resume {quote_path(folder)}"
        )
    try:
        collect_results(record)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(
            f"{folder / 'run.json'} does not have the fields of this version of dmt; repeat the "
            f"run: dmt distill {quote_path(folder / 'config.yaml')}"
        ) from None
    return ComparedRun(
        name, str(folder), record, _load_settings(folder / "config.yaml"), read_curves(folder)
    )


def _load_settings(path: Path) -> dict[str, Any]:
    """Return every setting by dotted name; defaults for those that the file does not have."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    raw_settings: Any = {}
    try:
        if path.is_file():
            raw_settings = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):
        raise UserError(
            f"{path} is not valid YAML; the run wrote it at its start, restore it"
        ) from None
    settings = flatten(asdict(Config()))
    return settings | (flatten(raw_settings) if isinstance(raw_settings, dict) else {})


def flatten(nested: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
