"""The page of a consolidation: what is answered without the context, with it and after, from its record and its curves.

What a consolidation says about itself: the plan, the table with context, without and consolidated, `report.md`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel

from dmt import files
from dmt.config import Config
from dmt.consolidation.context import Context
from dmt.evaluation.questions import Question
from dmt.models.forward import encode_text, forward_with_prefix
from dmt.report.compare import overlay_curves
from dmt.report.distillation import (
    flatten_settings,
    format_percent,
    format_provenance,
    list_run_locations,
)
from dmt.report.html import Card, HtmlRow, HtmlTable, Page, write_report_safely
from dmt.training.run_dir import read_record

NUM_TIMED_QUESTIONS = 12
"""Questions by which seconds are measured, one at a time."""

console = Console()


def needs_training(config: Config) -> bool:
    """Whether there are gradient steps: not where rows are written in one pass."""
    return config.context.target != "memory" or config.context.row_method == "trained"


def describe_target(config: Config) -> str:
    """Where the context goes, in words."""
    settings = config.context
    return {
        "memory": f"memory: rows, by {'training' if settings.row_method == 'trained' else f'the {settings.row_method} in one pass'}",
        "weights": f"weights: {settings.trainable}"
        + (f", rank {settings.lora_rank}" if settings.trainable == "lora" else ""),
        "prompt": f"prompt: {settings.prompt_length} embeddings before every text",
    }[settings.target]


def print_plan(
    config: Config,
    run_dir: Path,
    context: Context,
    questions: Sequence[Question],
    steps: int,
    num_facts: int,
) -> None:
    """Print what is about to happen."""
    table = Table.grid(padding=(0, 2))
    chunk_note = f", read in {len(context.chunks)} windows" if len(context.chunks) > 1 else ""
    table.add_row("model", config.teacher)
    table.add_row(
        "context",
        f"{config.context.file or 'context.text'}: {context.num_tokens:,} tokens{chunk_note}",
    )
    table.add_row("into", describe_target(config))
    table.add_row(
        "objective",
        f"{config.context.objective}, {steps:,} steps"
        if steps
        else f"{config.context.objective}, no gradient steps",
    )
    table.add_row("questions", f"{len(questions)}")
    if num_facts and config.context.target != "memory":
        table.add_row(
            "facts",
            f"the {num_facts:,} rows of facts of {config.teacher} stay there: they know its weights alone",
        )
    table.add_row("folder", str(run_dir))
    console.print(table)


def measure_cost(
    run_state: Any, student: PreTrainedModel, prefix: Sequence[int]
) -> dict[str, float]:
    """Tokens, bytes and seconds a question: the context in every prompt, kept in the cache, and consolidated.

    Of several windows the cache has all, a prompt the longest.
    """
    longest_teacher = max(run_state.teachers, key=lambda teacher: len(teacher.ids))
    prompts = [
        torch.tensor(
            [encode_text(run_state.tokenizer, question.prompt, add_prefix=False)],
            device=run_state.device,
        )
        for question in run_state.questions[:NUM_TIMED_QUESTIONS]
    ]
    methods: dict[str, Callable[[torch.Tensor], Any]] = {
        "in every prompt": lambda tokens: forward_with_prefix(
            run_state.base, longest_teacher.ids, tokens
        ),
        "in the cache": longest_teacher.predict,
        "consolidated": lambda tokens: forward_with_prefix(student, prefix, tokens),
    }
    seconds = {}
    for name, method in methods.items():
        durations = []
        for tokens in prompts:
            start = time.perf_counter()
            signals = method(tokens)
            signals.head(signals.hidden[:, -1:])
            durations.append(time.perf_counter() - start)
        seconds[f"seconds {name}"] = sorted(durations)[len(durations) // 2]
    cache_bytes = sum(teacher.cache_bytes for teacher in run_state.teachers)
    return {
        "prompt tokens saved": len(longest_teacher.ids) - len(prefix),
        "bytes of the cache": cache_bytes,
        **seconds,
    }


def format_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table: kind of question, how many, log-probability and recall without, with, consolidated; share kept."""
    return [
        (
            kind,
            str(scores["questions"]),
            *(
                f"{scores[f'log_probability_{name}']:.2f} / {scores[f'recall_{name}']:.2f}"
                for name in ("without", "with", "consolidated")
            ),
            "-" if scores["share"] is None else f"{scores['share']:.3f}",
        )
        for kind, scores in results.get("kinds", {}).items()
    ]


HEADINGS = ("questions", "", "without", "with context", "consolidated", "share kept")


def write_report(
    run_dir: Path,
    config: Config,
    context: Context,
    questions: Sequence[Question],
    results: dict[str, Any],
) -> None:
    """Print the table and where everything is; write `report.md`, `report.html` and the figures for TensorBoard."""
    table = Table(title="log-probability of the right answer / share that would be said")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "questions" else "right")
    for row in format_rows(results):
        table.add_row(*row)
    if questions:
        console.print(table)
    notes = _format_notes(results)
    files.atomic_write(
        run_dir / "report.md", _format_markdown(run_dir, config, context, questions, results, notes)
    )
    prompt_answers, target = (
        [(question.prompt, question.answer) for question in questions],
        describe_target(config),
    )
    page_path = write_report_safely(
        lambda: build_consolidation_page(
            run_dir, config, read_record(run_dir), context.text, prompt_answers, notes, target
        ),
        run_dir / "report.html",
    )
    outputs = {"student": str(run_dir / "student"), "report": page_path}
    console.print(
        "\n".join(notes),
        *(f"\n{name:8} {path}" for name, path in outputs.items()),
        highlight=False,
        sep="",
        soft_wrap=True,
    )
    kinds, steps = (
        results.get("kinds", {}),
        config.stages.end_to_end_steps if needs_training(config) else 0,
    )
    metrics = {
        f"hparam/share_{kind}": scores["share"]
        for kind, scores in kinds.items()
        if scores["share"] is not None
    }
    metrics |= {
        f"hparam/{corpus}_kl": scores["kl"] for corpus, scores in results["unrelated"].items()
    }
    settings = flatten_settings(config, ("context", "stages", "loss"))
    with SummaryWriter(str(run_dir)) as writer:
        writer.add_hparams(settings, metrics, run_name=".", global_step=steps)


def _format_notes(results: dict[str, Any]) -> list[str]:
    write_stats, seconds = results["written"], results["seconds"]
    summary = (
        f"{write_stats['facts']} facts in {write_stats['rows']} rows"
        if "rows" in write_stats
        else f"{write_stats['weights']:,} weights trained"
    )
    notes = [f"written: {summary}, {write_stats['bytes']:,} bytes"]
    if false_triggers := write_stats.get("loose"):
        notes.append(
            f"taken out again: {false_triggers} facts whose rows answered in unrelated text, where nobody asked"
        )
    for corpus, metrics in results["unrelated"].items():
        notes.append(
            f"unrelated text ({corpus}): KL {metrics['kl']:.2e} nats per token over {metrics['tokens']:,.0f} tokens"
        )
    if metrics := results.get("cost"):
        notes.append(
            f"a question: {metrics['prompt tokens saved']:,} prompt tokens saved; "
            + ", ".join(
                f"{metrics[f'seconds {method}'] * 1e3:.1f} ms {method}"
                for method in ("in every prompt", "in the cache", "consolidated")
            )
            + f"; the cache takes {metrics['bytes of the cache']:,} bytes"
        )
    notes.append(
        "spent: "
        + ", ".join(
            f"{seconds[phase]:.1f} s to {phase}" for phase in ("prepare", "consolidate", "measure")
        )
    )
    return notes


def _format_markdown(
    run_dir: Path,
    config: Config,
    context: Context,
    questions: Sequence[Question],
    results: dict[str, Any],
    notes: list[str],
) -> str:
    lines = [
        f"# {run_dir.name}: {describe_target(config)}, objective {config.context.objective}",
        "",
    ]
    lines += ["| " + " | ".join(HEADINGS) + " |", "|---|---:|---:|---:|---:|---:|"]
    lines += ["| " + " | ".join(row) + " |" for row in format_rows(results)] + [""]
    lines += [
        "Log-probability of the right answer / share that greedy decoding would say. Share kept: of what the context does for",
        "log-probability.",
        "",
    ]
    lines += [f"- {note}" for note in notes] + ["", "## Context", "", context.text, ""]
    if answers := results.get("answers"):
        lines += [
            "## Questions",
            "",
            "| prompt | answer | without | with context | consolidated |",
            "|---|---|---:|---:|---:|",
        ]
        for index, question in enumerate(questions):
            cells = (
                f"{-answers[name]['nats'][index]:.2f}{' ✓' if answers[name]['right'][index] else ''}"
                for name in ("without", "with", "consolidated")
            )
            texts = (
                text.replace("|", "/").replace("\n", " ")
                for text in (question.prompt, question.answer)
            )
            lines.append("| " + " | ".join([*texts, *cells]) + " |")
        lines.append("")
    lines.append(
        f"Replay: `python distill.py {run_dir}/config.yaml`. What produced this: `run.json`."
    )
    return "\n".join(lines) + "\n"


CONDITIONS = ("without", "with", "consolidated")
COLUMNS = ("without", "with the context", "consolidated")


def build_consolidation_page(
    run_dir: Path,
    config: Config,
    record: Mapping[str, Any],
    context: str,
    questions: Sequence[tuple[str, str]],
    notes: list[str],
    target_name: str,
) -> Page:
    """What `run.json` of a finished consolidation says, as a page.

    Args:
        text: the context.
        asked: prompts and answers of the questions, in the order of the record's.
        notes: what was written, what it did to other text, what it cost.
        where: what the context was put into, in words.
    """
    summary = f"A context was put into {config.teacher}, into {target_name}, so that it answers without as it would with it."
    page = Page(
        run_dir.name,
        summary,
        "consolidation",
        provenance=format_provenance(record),
        locations=list_run_locations(run_dir, record),
        notes=notes,
        context=context,
    )
    page.locations = [
        location
        for location in page.locations
        if config.stages.end_to_end_steps or location[0] != "curves"
    ]
    kinds = record.get("kinds", {})
    for kind, scores in kinds.items():
        if scores["share"] is not None:
            meaning = "of what the context does for the log-probability of the right answer"
            page.cards.append(
                Card(
                    format_percent(scores["share"]),
                    f"of the context's benefit kept, {kind}",
                    meaning,
                )
            )
        page.cards.append(
            Card(
                format_percent(scores["recall_consolidated"]),
                f"answered rightly, {kind}",
                f"{scores['questions']} questions",
            )
        )
    for corpus, scores in record["unrelated"].items():
        page.cards.append(
            Card(
                f"{scores['kl']:.1e}",
                f"nats changed per token of {corpus}",
                "text that the context says nothing of",
            )
        )
    if kinds:
        rows = []
        for kind, scores in kinds.items():
            nats = tuple(
                f"{scores[f'log_probability_{condition}']:.2f}" for condition in CONDITIONS
            )
            recalls = tuple(
                format_percent(scores[f"recall_{condition}"]) for condition in CONDITIONS
            )
            rows.append(
                HtmlRow(
                    f"{kind}: log-probability", "of the right answer, in nats; 0 is certain", nats
                )
            )
            rows.append(
                HtmlRow(
                    f"{kind}: answered rightly",
                    f"of {scores['questions']} questions, said greedily",
                    recalls,
                )
            )
        page.tables.append(HtmlTable("What is answered", COLUMNS, rows))
    if answers := record.get("answers"):
        question_rows = [
            HtmlRow(
                prompt,
                answer,
                tuple(
                    f"{-answers[condition]['nats'][index]:.2f}{' ✓' if answers[condition]['right'][index] else ''}"
                    for condition in CONDITIONS
                ),
            )
            for index, (prompt, answer) in enumerate(questions)
        ]
        page.tables.append(
            HtmlTable(
                "Question by question",
                COLUMNS,
                question_rows,
                "Log-probability of the answer; ✓ where it is said.",
            )
        )
    page.plots = overlay_curves({"": record.get("curves", {})})
    return page
