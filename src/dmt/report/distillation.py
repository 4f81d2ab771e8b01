"""The page of a teacher's own training, from its record and its curves.

What a run says about itself at its end: what was measured, the table, `report.md`, `report.html`.

The page of a distillation: what its student came to, in plain words and pictures, from its record and its curves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel

from dmt import files
from dmt.config import Config
from dmt.errors import format_value
from dmt.evaluation.metrics import FidelityMetrics
from dmt.evaluation.samples import SamplePair
from dmt.evaluation.samples import format_samples_table as continuations_table
from dmt.models.conversion import get_associative_memories, get_featural_memories
from dmt.models.external_tensors import SLOTS_FILE
from dmt.models.external_tensors import measure_bytes as filed_sizes
from dmt.models.forward import forward_with_activations
from dmt.report.compare import Curve, overlay_curves
from dmt.report.html import (
    Card,
    HtmlRow,
    HtmlTable,
    Page,
    Sample,
    draw_usage_maps,
    write_report_safely,
)
from dmt.report.svg import Plot, Series, draw_plot
from dmt.training.callbacks import compute_slot_usage
from dmt.training.run_dir import read_record

COMPARED_SETTINGS = ("student", "memory", "data", "loss", "stages", "optim")
"""Groups of settings that stand in TensorBoard's HParams."""

MAX_USAGE_BINS = 4_096
"""Most numbers by which the usage of one layer's slots is written down."""

console = Console()


def print_untrained_fidelity(metrics_by_corpus: dict[str, FidelityMetrics]) -> None:
    """Print how good the student is before any gradient step."""
    for corpus, metrics in metrics_by_corpus.items():
        console.print(
            f"before training: {corpus} perplexity ratio {metrics.ppl_ratio:.3f}, KL {metrics.kl:.3f} nats per token"
        )


def metrics_to_dict(metrics: FidelityMetrics) -> dict[str, float]:
    """A tally as it is written to `run.json`."""
    names = ("teacher_perplexity", "student_perplexity", "ppl_ratio", "kl", "top1_agreement", "tokens")
    return {name: getattr(metrics, name) for name in names}


def bin_slot_reads(reads: Tensor) -> dict[str, Any]:
    """Reads per slot `(slots,)` as a list of at most `CELLS`, each the sum over `reads_of` slots that stand together."""
    slots_per_bin = -(-len(reads) // MAX_USAGE_BINS)
    return {
        "reads": [int(bin_reads.sum()) for bin_reads in reads.cpu().split(slots_per_bin)],
        "reads_of": slots_per_bin,
    }


def collect_slot_usage(student: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """Usage of each layer's slots since counting began; stops counting."""
    usage_by_layer = {}
    for layer, memory in get_featural_memories(student).items():
        assert memory.read_counts is not None, "count_reads was called before the text was read"
        usage_by_layer[str(layer)] = compute_slot_usage(memory.read_counts) | {
            "slots": memory.num_slots,
            "k": memory.k,
        }
        usage_by_layer[str(layer)]["read"] = float(memory.read_counts.sum()) / memory.counted_tokens
        usage_by_layer[str(layer)] |= bin_slot_reads(memory.read_counts) | {
            "tokens": memory.counted_tokens
        }
        memory.read_counts = None
    return usage_by_layer


@torch.no_grad()
def measure_search_recall(student: PreTrainedModel, windows: Tensor) -> dict[str, float]:
    """By layer, the share of an exact search's slots that a token alone is given by one that looks for candidates.

    Whole windows are scored exactly where that is faster, so the fidelity to the teacher does not show it.
    """
    approximate = {
        layer: memory
        for layer, memory in get_featural_memories(student).items()
        if memory.search != "exact"
    }
    block_inputs = (
        forward_with_activations(student, windows, capture_blocks=True).block_inputs
        if approximate
        else ()
    )
    return {
        str(layer): memory.measure_recall(block_inputs[layer].flatten(0, -2))
        for layer, memory in approximate.items()
    }


def collect_row_stats(student: PreTrainedModel) -> dict[str, dict[str, float]]:
    """Rows of each associative memory and the base's share in what it said since listening began; stops listening."""
    stats_by_layer = {}
    for layer, memory in get_associative_memories(student).items():
        assert memory.retrieval_stats is not None, "listening began before the text was read"
        width = memory.rows.keys.shape[1] + memory.rows.values.shape[1]
        stats_by_layer[str(layer)] = {
            "rows": len(memory.rows),
            "base": memory.retrieval_stats.mean_null_weight,
            "bytes": 4 * width * len(memory.rows),
        }
        memory.retrieval_stats = None
    return stats_by_layer


def measure_sizes(
    teacher: PreTrainedModel, student: PreTrainedModel, student_dir: Path
) -> dict[str, int]:
    """Bytes of weights in memory, and of the student saved in the folder `saved` on disk.

    Of slots that are in a file of their own, what is held of them in RAM counts as in memory.
    """
    models = {"teacher": teacher, "student": student}
    num_bytes = {
        name: sum(p.numel() * p.element_size() for p in model.parameters())
        for name, model in models.items()
    }
    external = [
        memory
        for memory in get_featural_memories(student).values()
        if memory.mmap_tensors is not None
    ]
    num_bytes["student"] += sum(memory.external_sizes()["ram"] for memory in external)
    file_names, bytes_left_on_disk = (
        ["model.safetensors", *([SLOTS_FILE] if external else [])],
        filed_sizes(student)["disk"],
    )
    num_bytes["student_on_disk"] = sum((student_dir / file).stat().st_size for file in file_names)
    return num_bytes | ({"student_left_on_disk": bytes_left_on_disk} if bytes_left_on_disk else {})


def flatten_settings(config: Config, groups: Iterable[str]) -> dict[str, bool | int | float | str]:
    """Settings that may tell one run from another, by dotted name; lists in words, and `default` for what is left empty."""
    values: dict[str, Any] = {"teacher": config.teacher, "seed": config.seed}
    for group in groups:
        for name, value in asdict(getattr(config, group)).items():
            plain = (
                value
                if isinstance(value, bool | int | float | str)
                else "default"
                if value is None
                else format_value(value)
            )
            values[f"{group}.{name}"] = plain
    return values


def log_hyperparameters(config: Config, run_dir: Path, results: dict[str, Any]) -> None:
    """HParams for TensorBoard, written once, with the results they led to, at the step they were measured after."""
    settings = flatten_settings(config, COMPARED_SETTINGS)
    slot_usage = results["slots"].values()
    settings |= {
        f"memory.{name}": max(layer_usage[name] for layer_usage in slot_usage)
        for name in ("k", "slots")
        if slot_usage
    }
    metrics: dict[str, float] = {}
    for corpus, scores in results["fidelity"].items():
        metrics |= {
            f"hparam/{corpus}_{name}": scores[name] for name in ("ppl_ratio", "kl", "top1_agreement")
        }
        metrics |= {
            f"hparam/{corpus}_{name}": scores[name]["student"]
            for name in ("recall", "recall_unseen")
            if name in scores
        }
    if slot_usage:
        metrics |= {
            "hparam/slots_read": sum(layer_usage["read"] for layer_usage in slot_usage),
            "hparam/slots_dead": sum(layer_usage["dead"] for layer_usage in slot_usage),
        }
    if rows_by_layer := results.get("rows"):
        metrics["hparam/rows"] = sum(layer_rows["rows"] for layer_rows in rows_by_layer.values())
    with SummaryWriter(str(run_dir)) as writer:
        steps = config.stages.layerwise_steps + config.stages.end_to_end_steps
        writer.add_hparams(settings, metrics, run_name=".", global_step=steps)


def build_table_rows(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The table: measure, teacher, student, and how they compare."""
    table = []
    for corpus, scores in results["fidelity"].items():
        teacher, student = (
            f"{scores['teacher_perplexity']:.3f}",
            f"{scores['student_perplexity']:.3f}",
        )
        table.append((f"{corpus}: perplexity", teacher, student, f"ratio {scores['ppl_ratio']:.4f}"))
        table.append((f"{corpus}: KL, nats/token", "0", f"{scores['kl']:.4f}", ""))
        table.append((f"{corpus}: same top-1 token", "1", f"{scores['top1_agreement']:.4f}", ""))
        for name, title in (("recall", "facts recalled"), ("recall_unseen", "in unseen phrasings")):
            if recall := scores.get(name):
                retained = (
                    f"{recall['student'] / recall['teacher']:.4f} of it"
                    if recall["teacher"]
                    else ""
                )
                table.append(
                    (
                        f"{corpus}: {title}",
                        f"{recall['teacher']:.4f}",
                        f"{recall['student']:.4f}",
                        retained,
                    )
                )
    slot_usage, sizes_in_bytes = results["slots"].values(), results["bytes"]
    if slot_usage:
        num_read, num_slots, num_dead = (
            sum(layer_usage[name] for layer_usage in slot_usage)
            for name in ("read", "slots", "dead")
        )
        by_layer = ", ".join(f"{layer_usage['read']:.0f}" for layer_usage in slot_usage)
        table.append(
            (
                "slots read per token",
                f"{num_slots:,}",
                f"{num_read:,.1f}",
                f"1 / {num_slots / num_read:.1f}",
            )
        )
        table.append(
            (
                "layer by layer",
                "",
                by_layer if len(slot_usage) <= 12 else "",
                by_layer if len(slot_usage) > 12 else "",
            )
        )
        table.append(("dead slots", "", f"{num_dead:.0f}", f"{num_dead / num_slots:.2%}"))
    if scores := [layer_usage["recall"] for layer_usage in slot_usage if "recall" in layer_usage]:
        table.append(
            (
                "found of what an exact search reads",
                "",
                f"{sum(scores) / len(scores):.4f}",
                f"least {min(scores):.4f}",
            )
        )
    for layer, layer_rows in results.get("rows", {}).items():
        table.append(
            (
                f"rows of layer {layer}",
                "",
                f"{layer_rows['rows']:,}",
                f"{layer_rows['base']:.0%} is the base's",
            )
        )
    megabytes = {name: f"{num_bytes / 1e6:.1f}" for name, num_bytes in sizes_in_bytes.items()}
    on_disk = f"{megabytes['student_on_disk']} on disk"
    on_disk += (
        f", of which {megabytes['student_left_on_disk']} stay there"
        if "student_left_on_disk" in sizes_in_bytes
        else ""
    )
    table.append(("weights in memory, MB", megabytes["teacher"], megabytes["student"], on_disk))
    return table


def write_report(
    run_dir: Path,
    config: Config,
    results: dict[str, Any],
    continuations_by_corpus: dict[str, list[SamplePair]],
) -> None:
    """Print the table and where everything is; write `report.md`, then `report.html`."""
    table = Table(title="teacher and student on the same test text")
    for heading in ("", "teacher", "student", ""):
        table.add_column(heading, justify="right" if heading else "left")
    for row in build_table_rows(results):
        table.add_row(*row)
    console.print(table)
    record = read_record(run_dir)
    report_notes = build_notes(record)
    texts = {
        corpus: continuations_table(continuations)
        for corpus, continuations in continuations_by_corpus.items()
    }
    files.atomic_write(
        run_dir / "report.md", _render_markdown(run_dir, results, report_notes, texts)
    )
    page_message = write_report_safely(
        lambda: build_distillation_page(run_dir, config, record), run_dir / "report.html"
    )
    locations = {
        "curves": f"tensorboard --logdir {run_dir.parent}",
        "student": str(run_dir / "student"),
        "report": f"{run_dir / 'report.md'}; {page_message}",
    }
    console.print(
        "\n".join(report_notes),
        *(f"\n{name:8} {location}" for name, location in locations.items()),
        highlight=False,
        sep="",
        soft_wrap=True,
    )


def _render_markdown(
    run_dir: Path, results: dict[str, Any], notes: list[str], texts: dict[str, str]
) -> str:
    lines = [f"# {run_dir.name}", "", "| | teacher | student | |", "|---|---:|---:|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in build_table_rows(results)] + [""]
    lines += [f"- {note}" for note in notes] + [""]
    for corpus, text in texts.items():
        lines += [f"## {corpus}: how both go on", "", text, ""]
    lines.append(
        f"Replay: `python distill.py {run_dir}/config.yaml`. What produced this: `run.json`; tensor by tensor: `transfer.txt`."
    )
    return "\n".join(lines) + "\n"


MAX_LAYER_TICKS = 12
"""Layers up to which each has its own tick."""


def build_distillation_page(run_dir: Path, config: Config, record: Mapping[str, Any]) -> Page:
    """What `run.json` of a finished distillation says, as a page."""
    fidelity, curves = record["fidelity"], record.get("curves", {})
    first_corpus = next(iter(fidelity))
    scores = fidelity[first_corpus]
    summary = (
        f"A copy of the teacher {config.teacher!r} whose feed-forward blocks are memory. On {first_corpus} that neither had seen, both "
        f"find the same next token likeliest in {format_percent(scores['top1_agreement'])} of places; the student's perplexity is "
        f"{scores['ppl_ratio']:.3f} times the teacher's."
    )
    page = Page(
        run_dir.name,
        summary,
        "distillation",
        provenance=format_provenance(record),
        locations=list_run_locations(run_dir, record),
    )
    page.cards = _build_cards(first_corpus, record)
    page.tables = [
        HtmlTable(
            "Teacher and student on the same test text",
            ("teacher", "student", ""),
            _build_fidelity_rows(record),
        )
    ]
    page.plots = [
        item
        for item in (
            *plot_losses(curves),
            plot_fidelity_curves(curves, list(fidelity)),
            plot_layer_errors(curves),
            plot_budget_curve(record),
        )
        if item is not None
    ]
    page.usage_maps = draw_usage_maps(record["slots"])
    if page.usage_maps:
        tokens = next(
            slot_usage["tokens"]
            for slot_usage in record["slots"].values()
            if slot_usage.get("reads")
        )
        item = max(
            slot_usage["reads_of"]
            for slot_usage in record["slots"].values()
            if slot_usage.get("reads")
        )
        cell_text = "one cell a slot" if item == 1 else f"a cell stands for up to {item} slots"
        page.usage_caption = f"Counted over {tokens:,} tokens of test text, {cell_text}; all layers have one scale, a square root."
    if rows_by_layer := record.get("rows"):
        page.tables.append(_build_stored_rows_table(rows_by_layer))
    page.samples = [
        Sample(
            corpus,
            mark_line_breaks(item["prompt"]),
            [
                (
                    model_name,
                    [(mark_line_breaks(text), is_unique) for text, is_unique in item[model_name]],
                )
                for model_name in ("teacher", "student")
            ],
            f"{item['differing']} of the student's {item['tokens']} tokens are not the teacher's",
        )
        for corpus, corpus_samples in record.get("samples", {}).items()
        for item in corpus_samples
    ]
    page.notes = build_notes(record)
    return page


def format_percent(fraction: float, digits: int = 1) -> str:
    """A share of one as people write it."""
    return f"{100 * fraction:.{digits}f}\N{NO-BREAK SPACE}%"


def format_factor(factor: float, digits: int = 4) -> str:
    """How many times as much something is."""
    return f"×\N{NO-BREAK SPACE}{factor:.{digits}f}"


def mark_line_breaks(text: str) -> str:
    """Text whose line ends are seen, and take no room."""
    return re.sub(r"\s*\n\s*", " ↵ ", text)


def format_provenance(record: Mapping[str, Any]) -> str:
    """Where a page comes from, on one line."""
    version = record.get("libraries", {}).get("torch", "?")
    return f"written {record.get('written', '?')} by dmt, commit {str(record.get('commit', '?'))[:12]}, torch {version}"


def list_run_locations(run_dir: Path, record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Where everything of a run is, and how to do it again."""
    return [
        ("student", str(run_dir / "student")),
        ("ask it", f"dmt generate 'Once' --model {run_dir}"),
        ("replay", str(record.get("replay", f"python distill.py {run_dir}/config.yaml"))),
        ("compare", f"dmt compare {run_dir} ANOTHER_RUN --html compared.html"),
        ("curves", f"tensorboard --logdir {run_dir.parent}"),
        ("settings", str(run_dir / "config.yaml")),
        ("numbers", str(run_dir / "run.json")),
        ("as text", str(run_dir / "report.md")),
    ]


def _build_cards(first_corpus: str, record: Mapping[str, Any]) -> list[Card]:
    scores, slot_usage = record["fidelity"][first_corpus], record["slots"].values()
    cards = [
        Card(
            format_percent(scores["top1_agreement"]),
            f"same next token, {first_corpus}",
            "places where both find the same next token likeliest",
        ),
        Card(
            format_factor(scores["ppl_ratio"], 3),
            f"the teacher's perplexity, {first_corpus}",
            "1 would be as good as the teacher",
        ),
        Card(
            f"{scores['kl']:.3f}",
            f"nats apart per token, {first_corpus}",
            "KL(teacher || student): 0 would be the same",
        ),
    ]
    if slot_usage:
        slots_per_read = sum(layer_usage["slots"] for layer_usage in slot_usage) / max(
            1e-9, sum(layer_usage["read"] for layer_usage in slot_usage)
        )
        cards.append(
            Card(
                f"1 in {slots_per_read:.1f}",
                "slots read for a token",
                "mean over test text and layers",
            )
        )
    for corpus, corpus_scores in record["fidelity"].items():
        if recall := corpus_scores.get("recall"):
            label = f"facts recalled, {corpus}; teacher {format_percent(recall['teacher'])}"
            cards.append(
                Card(
                    format_percent(recall["student"]),
                    label,
                    f"of {recall['probes']:,} questions with one right answer",
                )
            )
    return cards


def _build_fidelity_rows(record: Mapping[str, Any]) -> list[HtmlRow]:
    rows = []
    for corpus, scores in record["fidelity"].items():
        rows += [
            HtmlRow(
                f"{corpus}: perplexity",
                "among how many tokens it hesitates; lower is better",
                (
                    f"{scores['teacher_perplexity']:.3f}",
                    f"{scores['student_perplexity']:.3f}",
                    format_factor(scores["ppl_ratio"]),
                ),
            ),
            HtmlRow(
                f"{corpus}: distance",
                "KL from the teacher, nats per token; 0 is the same",
                ("0", f"{scores['kl']:.4f}", ""),
            ),
            HtmlRow(
                f"{corpus}: agreement",
                "places where both find the same next token likeliest",
                (format_percent(1, 0), format_percent(scores["top1_agreement"]), ""),
            ),
        ]
        for name, label in (
            ("recall", "facts known"),
            ("recall_unseen", "facts, asked in new words"),
        ):
            if recall := scores.get(name):
                retained = (
                    f"{format_percent(recall['student'] / recall['teacher'])} of it"
                    if recall["teacher"]
                    else ""
                )
                meaning = f"of {recall['probes']:,} questions, those answered rightly"
                rows.append(
                    HtmlRow(
                        f"{corpus}: {label}",
                        meaning,
                        (
                            format_percent(recall["teacher"]),
                            format_percent(recall["student"]),
                            retained,
                        ),
                    )
                )
    if slot_usage := record["slots"].values():
        num_read, num_slots, num_dead = (
            sum(layer_usage[name] for layer_usage in slot_usage)
            for name in ("read", "slots", "dead")
        )
        rows.append(
            HtmlRow(
                "slots read for a token",
                "all layers together; the teacher reads every neuron",
                (
                    f"{num_slots:,}",
                    f"{num_read:,.1f}",
                    f"1 in {num_slots / max(num_read, 1e-9):.1f}",
                ),
            )
        )
        rows.append(
            HtmlRow(
                "slots never read",
                "on the test text",
                ("", f"{num_dead:,.0f}", format_percent(num_dead / num_slots, 2)),
            )
        )
    megabytes = {name: f"{num_bytes / 1e6:.1f}" for name, num_bytes in record["bytes"].items()}
    rows.append(
        HtmlRow(
            "weights, MB",
            "in memory",
            (megabytes["teacher"], megabytes["student"], f"{megabytes['student_on_disk']} on disk"),
        ),
    )
    return rows


def _build_stored_rows_table(rows_by_layer: Mapping[str, Any]) -> HtmlTable:
    rows = [
        HtmlRow(
            f"layer {layer}",
            "",
            (
                f"{layer_rows['rows']:,}",
                format_percent(1 - layer_rows["base"]),
                f"{layer_rows['bytes'] / 1e6:.1f}",
            ),
        )
        for layer, layer_rows in rows_by_layer.items()
    ]
    caption = "Associative memory writes rows while it trains; what they say is added to what the layer's base says."
    return HtmlTable("Stored rows", ("rows", "their part in what is said", "MB"), rows, caption)


def plot_losses(curves: Mapping[str, Curve]) -> list[Plot]:
    """Loss curves, one plot a stage; of the end-to-end stage each term."""
    plots = []
    if layerwise := curves.get("layerwise/loss"):
        caption = "Each memory alone learns its own block's output: the squared error, summed over layers."
        plots.append(
            draw_plot(
                "First stage: layer by layer",
                "step",
                "loss",
                [Series("", *layerwise)],
                caption,
                log_axes="y",
            )
        )
    terms = {
        name.partition("/")[2]: curve
        for name, curve in curves.items()
        if name.startswith("end_to_end/")
    }
    order = ["loss", *sorted(name for name in terms if name != "loss")]
    series = [
        Series(name.replace("_", " "), *terms[name], color=index, dash=index)
        for index, name in enumerate(
            name for name in order if name in terms and max(terms[name][1]) > 0
        )
    ]
    if series:
        caption = "The whole student learns what the teacher says. The loss is the weighted sum of its terms; kl is in nats per token."
        plots.append(
            draw_plot(
                "Second stage: end to end",
                "step",
                "loss and its terms",
                series,
                caption,
                log_axes="y",
            )
        )
    return plots


def plot_fidelity_curves(curves: Mapping[str, Curve], corpora: list[str]) -> Plot | None:
    """KL on validation text while training."""
    corpus_curves = [
        (index, corpus, curves[f"{corpus}/kl"])
        for index, corpus in enumerate(corpora)
        if f"{corpus}/kl" in curves
    ]
    if not corpus_curves:
        return None
    series = [
        Series(
            corpus,
            *curve,
            tips=[f"{corpus}, step {x}: {y:.4f} nats" for x, y in zip(*curve, strict=True)],
            color=index,
            dash=index,
        )
        for index, corpus, curve in corpus_curves
    ]
    caption = "Validation text, on which nothing is trained."
    return draw_plot(
        "Distance from the teacher while training",
        "step",
        "KL, nats per token",
        series,
        caption,
        log_axes="y",
    )


def plot_layer_errors(curves: Mapping[str, Curve]) -> Plot | None:
    """Each memory's error on what its teacher's block was given: at the first and at the last validation."""
    curve_by_layer = {
        int(name.rpartition("_")[2]): curve
        for name, curve in curves.items()
        if name.startswith("block_error/layer_")
    }
    if not curve_by_layer:
        return None
    layers = sorted(curve_by_layer)
    series = []
    for index, (name, point) in enumerate((("at the end", -1), ("at first validation", 0))):
        step, errors = (
            curve_by_layer[layers[0]][0][point],
            [curve_by_layer[layer][1][point] for layer in layers],
        )
        tips = [
            f"layer {layer}, step {step}: {error:.4f}"
            for layer, error in zip(layers, errors, strict=True)
        ]
        if index and step == curve_by_layer[layers[0]][0][-1]:
            break
        series.append(
            Series(f"{name} (step {step})", layers, errors, tips, color=index, dash=index)
        )
    layer_ticks = (
        layers if len(layers) <= MAX_LAYER_TICKS else layers[:: -(-len(layers) // MAX_LAYER_TICKS)]
    )
    caption = "What a memory gets wrong of its own block's answer, as a share of its variance: 1 is no better than its mean."
    return draw_plot(
        "Error of each layer", "layer", "share of variance", series, caption, ticks=layer_ticks
    )


def plot_budget_curve(record: Mapping[str, Any]) -> Plot | None:
    """KL against slots read: the finished student with other budgets."""
    budgets = record.get("budgets") or {}
    points = budgets.get("points", [])
    if len(points) < 2:
        return None
    series = []
    for index, corpus in enumerate(points[0]["corpora"]):
        num_read, kls = (
            [entry["read"] for entry in points],
            [entry["corpora"][corpus]["kl"] for entry in points],
        )
        tips = [
            f"{corpus}: {entry['factor']:g} × k, {x:.1f} slots read, KL {kl:.4f}"
            for entry, x, kl in zip(points, num_read, kls, strict=True)
        ]
        series.append(Series(corpus, num_read, kls, tips, color=index, dash=index))
    trained_read = next((entry["read"] for entry in points if entry["factor"] == 1), None)
    caption = f"The finished student, read with other budgets and not trained for them; {budgets['tokens']:,.0f} test tokens."
    caption += f" Its own is {trained_read:.1f} slots." if trained_read is not None else ""
    x_label = "slots read per token and layer"
    return draw_plot(
        "What reading more, or less, would give",
        x_label,
        "KL, nats per token",
        series,
        caption,
        log_axes="xy",
        ticks=[float(f"{entry['read']:.3g}") for entry in points],
    )


def build_notes(record: Mapping[str, Any]) -> list[str]:
    """On how much text everything was measured, and what was spent."""
    lines = []
    for corpus, scores in record["fidelity"].items():
        num_questions = f", {scores['recall']['probes']:,} questions" if "recall" in scores else ""
        windows = f"{scores['windows']} windows of {scores['window']}, stride {scores['stride']}"
        lines.append(
            f"{corpus}: {scores['tokens']:,.0f} predicted tokens of test text in {windows}{num_questions}"
        )
    seconds, tokens = record["seconds"], record["tokens"]
    time_spent = ", ".join(
        f"{seconds[phase]:.0f} s to {phase}" for phase in ("prepare", "train", "measure")
    )
    if estimate := record.get("estimated"):
        more = f", up to {estimate['rows']:.0f} s more with rows" if estimate.get("rows") else ""
        time_spent += f" ({estimate['train']:.0f} s to train were expected, {estimate['measure']:.0f} s to measure{more})"
    lines.append(
        f"trained on {tokens['trained']:,} tokens, {tokens['per_second']:,.0f} a second; {time_spent}"
    )
    return lines


def build_pretraining_page(run_dir: Path, config: Config, record: Mapping[str, Any]) -> Page:
    """What `run.json` of a finished pretraining says, as a page."""
    summary = f"A teacher of {config.pretrain.layers} layers, width {config.pretrain.width}, trained for {config.pretrain.steps:,} steps."
    if config.pretrain.start:
        summary = (
            f"The teacher {config.pretrain.start} trained for {config.pretrain.steps:,} steps more."
        )
    page = Page(run_dir.name, summary, "pretraining", provenance=format_provenance(record))
    omitted = ("student", "ask it", "as text")
    page.locations = [
        ("teacher", config.pretrain.output),
        *(
            location
            for location in list_run_locations(run_dir, record)
            if location[0] not in omitted
        ),
    ]
    rows = []
    for corpus, scores in record["fidelity"].items():
        page.cards.append(
            Card(f"{scores['perplexity']:.3f}", f"perplexity, {corpus}", "lower is better")
        )
        rows.append(
            HtmlRow(
                f"{corpus}: perplexity",
                f"{scores['tokens']:,.0f} predicted tokens",
                (f"{scores['perplexity']:.3f}",),
            )
        )
        for name, label in (
            ("recall", "facts known"),
            ("recall_unseen", "facts, asked in new words"),
        ):
            if recall := scores.get(name):
                rows.append(
                    HtmlRow(
                        f"{corpus}: {label}",
                        f"of {recall['probes']:,} questions",
                        (format_percent(recall["teacher"]),),
                    )
                )
    page.tables = [HtmlTable("On test text", ("teacher",), rows)]
    page.plots = overlay_curves({"": record.get("curves", {})})
    page.notes = [f"{record['seconds']['total']:.0f} s in all"]
    return page
