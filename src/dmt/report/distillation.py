"""The report of a distillation: results table, `report.md` and `report.html`.

Everything shown comes from the record of the run (`run.json`) and its curves.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmt import files
from dmt.config import Config
from dmt.evaluation.samples import SamplePair, format_samples_table
from dmt.paths import KNOWLEDGE_FILE, quote_path
from dmt.report.curves import Curve, choose_layer_ticks, get_layer_errors
from dmt.report.hparams import find_changed_settings
from dmt.report.html import Card, Page, Sample, write_report_safely
from dmt.report.knowledge import build_knowledge_table
from dmt.report.model_card import get_display_name, write_model_card
from dmt.report.results import build_results_table, collect_results
from dmt.report.summary import Summary
from dmt.report.svg import Plot, Series, draw_plot
from dmt.report.tables import Table
from dmt.training.plan import describe_corpus
from dmt.training.run_dir import read_record

TABLE_TITLE = "teacher and student on the same test text"
# Names in the legend of the terms of the loss.
LOSS_TERM_PREFIX = "train/"
NOT_LOSS_TERMS = ("layerwise_loss", "kl_unrelated", "kl_new", "kl_replay")
MAX_TITLE_SETTINGS = 4

logger = logging.getLogger(__name__)


def build_table(record: Mapping[str, Any]) -> Table:
    """Return the results of a distillation: teacher, student and how they compare."""
    return build_results_table(TABLE_TITLE, collect_results(record), ("teacher", "student"))


def summarize(run_dir: Path, record: Mapping[str, Any]) -> Summary:
    """Return the results of a finished distillation, for the command line.

    Args:
        run_dir: folder of the run.
        record: contents of its `run.json`.
    """
    report = run_dir / "report.html"
    locations = {
        "curves": f"tensorboard --logdir {quote_path(run_dir.parent)}",
        "student": str(run_dir / "student"),
        "report": str(report if report.exists() else run_dir / "report.md"),
        "generate": f"dmt generate 'Once' --model {quote_path(run_dir)}",
    }
    if "knowledge" in record:
        locations["pack"] = str(run_dir / KNOWLEDGE_FILE)
        locations["unplug"] = f"dmt generate 'Once' --no-pack --model {quote_path(run_dir)}"
    return Summary(build_table(record), build_notes(record), locations)


def write_report(
    run_dir: Path, config: Config, samples_by_corpus: Mapping[str, Sequence[SamplePair]]
) -> None:
    """Write `report.md` and `report.html` of a finished distillation.

    Args:
        run_dir: folder of the run, with `run.json`.
        config: settings of the run.
        samples_by_corpus: continuations by name of the corpus.
    """
    record = read_record(run_dir)
    title, table, notes = build_title(run_dir, config), build_table(record), build_notes(record)
    files.atomic_write(
        run_dir / "report.md",
        _render_markdown(
            title, table, notes, samples_by_corpus, run_dir, build_knowledge_table(record)
        ),
    )
    page_message = write_report_safely(
        lambda: build_distillation_page(run_dir, config, record), run_dir / "report.html"
    )
    logger.info("report    %s; %s", run_dir / "report.md", page_message)
    if (run_dir / "student").is_dir():
        summary = f"{describe_teacher(config)} {describe_run(config, record)}"
        write_model_card(run_dir / "student", config, record, summary, table)


def build_title(run_dir: Path, config: Config) -> str:
    """Return the run's name and the settings that are not the defaults, the first few of them."""
    changed = find_changed_settings(config)
    texts = [f"{name}={text}" for name, text in changed.items()][:MAX_TITLE_SETTINGS]
    more = [f"{len(changed) - len(texts)} more"] if len(changed) > len(texts) else []
    return ": ".join([run_dir.name, *([", ".join([*texts, *more])] if texts else [])])


def describe_teacher(config: Config) -> str:
    """Return what the student of a run is, in a sentence."""
    return (
        f"{get_display_name(config.teacher)} with its feed-forward blocks replaced by memory "
        "layers, distilled from it."
    )


def describe_run(config: Config, record: Mapping[str, Any]) -> str:
    """Return the sizes of the student and the steps of the run, in a sentence."""
    parts = []
    if slot_usage := record.get("slots"):
        layers = list(slot_usage.values())
        sizes = sorted({layer["num_slots"] for layer in layers})
        active = sum(layer["active_per_token"] for layer in layers) / len(layers)
        sizes_text = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
        parts.append(
            f"{len(layers)} layers of {sizes_text} slots, {active:.1f} active per token and layer"
        )
    if knn_usage := record.get("knn"):
        num_rows = sum(layer["num_rows"] for layer in knn_usage.values())
        parts.append(f"{num_rows:,} stored rows")
    stages = config.stages
    parts.append(
        f"{stages.layerwise_steps:,} layer-wise and {stages.end_to_end_steps:,} end-to-end steps"
    )
    return f"Student: {'; '.join(parts)}."


def _render_markdown(
    title: str,
    table: Table,
    notes: Sequence[str],
    samples_by_corpus: Mapping[str, Sequence[SamplePair]],
    run_dir: Path,
    knowledge_table: Table | None,
) -> str:
    lines = [f"# {title}", "", table.to_markdown(), ""]
    lines += [f"- {note}" for note in notes] + [""]
    if knowledge_table is not None:
        lines += [f"## {knowledge_table.title}", "", knowledge_table.to_markdown(), ""]
    for corpus, samples in samples_by_corpus.items():
        lines += [f"## {corpus}: greedy continuations", "", format_samples_table(samples), ""]
    lines.append(
        f"Replay: `dmt distill {quote_path(run_dir / 'config.yaml')}`. "
        "Versions, machine and numbers: `run.json`; the source of each tensor: `weight_map.txt`."
    )
    return "\n".join(lines) + "\n"


def build_distillation_page(run_dir: Path, config: Config, record: Mapping[str, Any]) -> Page:
    """Return the page of a finished distillation.

    Args:
        run_dir: folder of the run.
        config: its settings.
        record: contents of its `run.json`.
    """
    fidelity, curves = record["fidelity"], record.get("curves", {})
    first_corpus = next(iter(fidelity))
    scores = fidelity[first_corpus]
    summary = (
        f"Teacher {config.teacher!r} with its feed-forward blocks replaced by memory layers. On "
        f"test text of {first_corpus}, teacher and student agree on the most likely next token "
        f"for {format_percent(scores['top1_agreement'])} of tokens; the student's perplexity is "
        f"{format_factor(scores['ppl_ratio'], 3)} the teacher's. {describe_run(config, record)}"
    )
    page = Page(
        build_title(run_dir, config),
        summary,
        "distillation",
        provenance=format_provenance(record),
        locations=list_run_locations(run_dir, record),
        notes=build_notes(record),
    )
    page.cards = _build_cards(first_corpus, record)
    table = build_table(record)
    page.tables = [Table("Results", table.columns, table.rows)]
    if (knowledge_table := build_knowledge_table(record)) is not None:
        page.tables.append(knowledge_table)
    plots = [
        *plot_losses(curves),
        plot_fidelity_curves(curves, list(fidelity)),
        plot_knowledge(curves),
        plot_layer_errors(curves),
    ]
    page.plots = [plot for plot in plots if plot is not None]
    page.samples = [
        Sample(
            corpus,
            mark_line_breaks(item["prompt"]),
            [
                (model, [(mark_line_breaks(text), is_unique) for text, is_unique in item[model]])
                for model in ("teacher", "student")
            ],
            f"{item['differing']} of the student's {item['tokens']} tokens differ",
        )
        for corpus, corpus_samples in record.get("samples", {}).items()
        for item in corpus_samples
    ]
    return page


def format_percent(fraction: float, digits: int = 1) -> str:
    """Return a fraction as a percentage."""
    return f"{100 * fraction:.{digits}f}\N{NO-BREAK SPACE}%"


def format_factor(factor: float, digits: int = 4) -> str:
    """Return a ratio as a factor."""
    return f"×\N{NO-BREAK SPACE}{factor:.{digits}f}"


def mark_line_breaks(text: str) -> str:
    """Return `text` with line breaks as a visible sign."""
    return re.sub(r"\s*\n\s*", " ↵ ", text)


def format_provenance(record: Mapping[str, Any]) -> str:
    """Return when and with which versions a record was written, on one line."""
    version = record.get("libraries", {}).get("torch", "?")
    commit = str(record.get("commit", "?"))[:12]
    return f"written {record.get('created_at', '?')} by dmt, commit {commit}, torch {version}"


def list_run_locations(run_dir: Path, record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the files of a run and the commands that use it, by name."""
    replay = record.get("replay_command", f"dmt distill {quote_path(run_dir / 'config.yaml')}")
    return [
        ("student", str(run_dir / "student")),
        ("generate", f"dmt generate 'Once' --model {quote_path(run_dir)}"),
        ("replay", str(replay)),
        ("compare", f"dmt compare {quote_path(run_dir)} ANOTHER_RUN --html compared.html"),
        ("curves", f"tensorboard --logdir {quote_path(run_dir.parent)}"),
        ("settings", str(run_dir / "config.yaml")),
        ("numbers", str(run_dir / "run.json")),
        ("as text", str(run_dir / "report.md")),
    ]


def _build_cards(first_corpus: str, record: Mapping[str, Any]) -> list[Card]:
    scores = record["fidelity"][first_corpus]
    cards = [
        Card(
            format_percent(scores["top1_agreement"]),
            f"top-1 agreement, {first_corpus}",
            "share of tokens with the same most likely next token",
        ),
        Card(
            format_factor(scores["ppl_ratio"], 3),
            f"the teacher's perplexity, {first_corpus}",
            "1 is as good as the teacher",
        ),
        Card(
            f"{scores['kl']:.3f}",
            f"KL in nats per token, {first_corpus}",
            "KL(teacher || student); 0 means identical predictions",
        ),
    ]
    if slot_usage := record["slots"].values():
        num_slots = sum(layer["num_slots"] for layer in slot_usage)
        num_active = sum(layer["active_per_token"] for layer in slot_usage)
        cards.append(
            Card(
                f"1 in {num_slots / max(1e-9, num_active):.1f}",
                "slots active per token",
                "mean over test text and layers",
            )
        )
    for corpus, corpus_scores in record["fidelity"].items():
        if recall := corpus_scores.get("recall"):
            label = f"facts recalled, {corpus}; teacher {format_percent(recall['teacher'])}"
            meaning = f"of {recall['num_probes']:,} questions with one correct answer"
            cards.append(Card(format_percent(recall["student"]), label, meaning))
    return cards


def plot_losses(curves: Mapping[str, Curve]) -> list[Plot]:
    """Return the loss curves, one plot for each stage; of the end-to-end stage each term."""
    plots = []
    if layerwise := curves.get("train/layerwise_loss"):
        caption = (
            "Each memory is trained on the output of the block that it replaces: squared error, "
            "summed over layers."
        )
        series = [Series("", *layerwise)]
        plots.append(draw_plot("Layer-wise stage", "step", "loss", series, caption, log_axes="y"))
    terms = {
        name.removeprefix(LOSS_TERM_PREFIX): curve
        for name, curve in curves.items()
        if name.startswith(LOSS_TERM_PREFIX)
        and name.removeprefix(LOSS_TERM_PREFIX) not in NOT_LOSS_TERMS
    }
    order = ["loss", *sorted(name for name in terms if name != "loss")]
    names = [name for name in order if name in terms and max(terms[name][1]) > 0]
    series = [
        Series(name.replace("_", " "), *terms[name], color=index, dash=index)
        for index, name in enumerate(names)
    ]
    if series:
        caption = (
            "The whole student is trained on the predictions of the teacher. The loss is the "
            "weighted sum of its terms; kl is in nats per token."
        )
        title, y_label = "End-to-end stage", "loss and its terms"
        plots.append(draw_plot(title, "step", y_label, series, caption, log_axes="y"))
    return plots


def plot_fidelity_curves(curves: Mapping[str, Curve], corpora: Sequence[str]) -> Plot | None:
    """Return the KL on validation text while training; None if it was not measured."""
    series = [
        Series(
            corpus,
            *curve,
            tips=[f"{corpus}, step {x}: {y:.4f} nats" for x, y in zip(*curve, strict=True)],
            color=index,
            dash=index,
        )
        for index, corpus in enumerate(corpora)
        if (curve := curves.get(f"val/{corpus}/kl")) is not None
    ]
    if not series:
        return None
    title, y_label = "KL from the teacher while training", "KL, nats per token"
    caption = "On validation text, which is not trained on."
    return draw_plot(title, "step", y_label, series, caption, log_axes="y")


def plot_knowledge(curves: Mapping[str, Curve]) -> Plot | None:
    """Return how many declared facts are recalled while training; None where there are none."""
    series = [
        Series(name, *curve, color=index, dash=index)
        for index, name in enumerate(("unplugged", "plugged"))
        if (curve := curves.get(f"knowledge/recall_{name}")) is not None
    ]
    if not series:
        return None
    caption = "Some of the declared facts, asked without the pack and with a pack of them."
    return draw_plot("Declared facts recalled while training", "step", "recall", series, caption)


def plot_layer_errors(curves: Mapping[str, Curve]) -> Plot | None:
    """Return each layer's error at the first and the last validation; None if not measured."""
    errors_by_layer = get_layer_errors(curves)
    if not errors_by_layer:
        return None
    layers = list(errors_by_layer)
    steps = errors_by_layer[layers[0]][0]
    series = []
    for index, (name, point) in enumerate((("last validation", -1), ("first validation", 0))):
        if index and steps[0] == steps[-1]:
            break
        errors = [errors_by_layer[layer][1][point] for layer in layers]
        tips = [
            f"layer {layer}, step {steps[point]}: {error:.4f}"
            for layer, error in zip(layers, errors, strict=True)
        ]
        label = f"{name} (step {steps[point]})"
        series.append(Series(label, layers, errors, tips, color=index, dash=index))
    caption = (
        "Squared error of each memory on the output of the block that it replaces, as a fraction "
        "of the output's variance; 1 is no better than the mean."
    )
    return draw_plot(
        "Error of each layer",
        "layer",
        "fraction of variance unexplained",
        series,
        caption,
        ticks=choose_layer_ticks(layers),
    )


def build_notes(record: Mapping[str, Any]) -> list[str]:
    """Return how much text was measured, and the tokens and time of the run."""
    notes = []
    for corpus, scores in record["fidelity"].items():
        questions = f", {scores['recall']['num_probes']:,} questions" if "recall" in scores else ""
        windows = f"{scores['num_windows']} windows of {scores['window']}"
        notes.append(
            f"{corpus}: {scores['tokens']:,.0f} predicted tokens of test text in {windows}, "
            f"stride {scores['stride']}{questions}"
        )
    notes += [
        f"{corpus['name']} was read from {describe_corpus(corpus)}"
        for corpus in record.get("corpora", [])
    ]
    seconds, tokens = record["seconds"], record["tokens"]
    phases = ", ".join(
        f"{name} {seconds[phase]:.0f} s"
        for phase, name in (
            ("prepare", "preparation"),
            ("train", "training"),
            ("measure", "evaluation"),
        )
    )
    notes.append(
        f"trained on {tokens['trained']:,} tokens, {tokens['per_second']:,.0f} per second; {phases}"
    )
    return notes
