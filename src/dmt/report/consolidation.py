"""The report of a consolidation: the plan, the results table, `report.md` and `report.html`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from dmt import files
from dmt.config import Config
from dmt.evaluation.questions import Question
from dmt.models.forward import encode_text, forward_with_prefix
from dmt.paths import quote_path
from dmt.report.curves import overlay_curves
from dmt.report.distillation import format_percent, format_provenance, list_run_locations
from dmt.report.hparams import SETTING_GROUPS, log_hparams
from dmt.report.html import Card, Page, write_report_safely
from dmt.report.model_card import get_display_name, write_model_card
from dmt.report.results import build_results_table, collect_results
from dmt.report.summary import Summary
from dmt.report.tables import Row, Table
from dmt.training.plan import describe_corpus
from dmt.training.run_dir import read_record

if TYPE_CHECKING:
    from dmt.consolidation.context import Context

NUM_TIMED_QUESTIONS = 12  # questions that are timed, one at a time
CONDITIONS = ("without_context", "with_context", "consolidated")
COLUMNS = ("without context", "with context", "consolidated")
TABLE_CAPTION = (
    "Log-probability of the correct answer, and share of answers that greedy decoding generates. "
    "Benefit: how much of the context's effect on the log-probability is retained without it."
)

logger = logging.getLogger(__name__)


def needs_training(config: Config) -> bool:
    """Return whether there are gradient steps: not if rows are written in one pass."""
    return config.context.target != "memory" or config.context.row_method == "trained"


def describe_target(config: Config) -> str:
    """Return what the context is stored in, for people."""
    settings = config.context
    row_method = (
        "training" if settings.row_method == "trained" else f"{settings.row_method}, one pass"
    )
    rank = f", rank {settings.lora_rank}" if settings.trainable == "lora" else ""
    return {
        "memory": f"memory: rows, by {row_method}",
        "weights": f"weights: {settings.trainable}{rank}",
        "prompt": f"prompt: {settings.prompt_length} embeddings before every text",
    }[settings.target]


def log_plan(
    config: Config,
    run_dir: Path,
    context: Context,
    questions: Sequence[Question],
    steps: int,
    num_facts: int,
    corpora: Sequence[Mapping[str, Any]],
) -> None:
    """Log what is about to happen.

    Args:
        config: the settings.
        run_dir: folder of the run.
        context: the context.
        questions: the questions about it.
        steps: number of gradient steps.
        num_facts: number of facts stored with the base model.
        corpora: what was read of each corpus, see `TextDataModule.to_record`.
    """
    chunks = f", read in {len(context.chunks)} windows" if len(context.chunks) > 1 else ""
    source = config.context.file or "context.text"
    step_note = f"{steps:,} steps" if steps else "no gradient steps"
    rows = {
        "model": config.teacher,
        "context": f"{source}: {context.num_tokens:,} tokens{chunks}",
        "target": describe_target(config),
        "objective": f"{config.context.objective}, {step_note}",
        "questions": f"{len(questions)}",
        "text": "; ".join(f"{corpus['name']}: {describe_corpus(corpus)}" for corpus in corpora),
    }
    if num_facts and config.context.target != "memory":
        rows["facts"] = (
            f"the {num_facts:,} facts of {config.teacher} stay there: they fit its weights only"
        )
    rows["folder"] = str(run_dir)
    logger.info("%s", "\n".join(f"{name:11}{text}" for name, text in rows.items()))


def measure_cost(
    run_state: Any, student: PreTrainedModel, prefix: Sequence[int]
) -> dict[str, float]:
    """Return what a question costs: with the context in the prompt or the KV cache, and without.

    With several windows, the cache holds all of them and a prompt the longest.

    Args:
        run_state: the `ConsolidationRun`.
        student: the consolidated model.
        prefix: token ids before a text of the student.
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
        "context_in_prompt": lambda tokens: forward_with_prefix(
            run_state.base, longest_teacher.ids, tokens
        ),
        "kv_cache": longest_teacher.predict,
        "consolidated": lambda tokens: forward_with_prefix(student, prefix, tokens),
    }
    seconds = {}
    for name, method in methods.items():
        durations = []
        for tokens in prompts:
            start = time.perf_counter()
            outputs = method(tokens)
            outputs.head(outputs.hidden[:, -1:]).cpu()  # waits until a GPU is done
            durations.append(time.perf_counter() - start)
        seconds[f"seconds_{name}"] = sorted(durations)[len(durations) // 2]
    return {
        "prompt_tokens_saved": len(longest_teacher.ids) - len(prefix),
        "kv_cache_bytes": sum(teacher.cache_bytes for teacher in run_state.teachers),
        **seconds,
    }


def build_table(record: Mapping[str, Any]) -> Table:
    """Return the results: without the context, with it, and consolidated."""
    return build_results_table("", collect_results(record), COLUMNS, TABLE_CAPTION)


def build_questions_table(
    answers: Mapping[str, Any], questions: Sequence[tuple[str, str]]
) -> Table:
    """Return the log-probability of each answer; ✓ marks answers that are generated.

    Args:
        answers: scores by condition, as in `run.json`.
        questions: prompts and answers, in the order of the scores.
    """
    rows = []
    for index, (prompt, answer) in enumerate(questions):
        scores = [answers[condition] for condition in CONDITIONS]
        cells = [
            f"{-score['nlls'][index]:.2f}{' ✓' if score['correct'][index] else ''}"
            for score in scores
        ]
        rows.append(Row(prompt, (answer, *cells)))
    caption = "Log-probability of the answer, in nats; ✓ where greedy decoding generates it."
    return Table("Question by question", ("answer", *COLUMNS), rows, caption, "prompt")


def write_report(
    run_dir: Path,
    config: Config,
    context: Context,
    questions: Sequence[Question],
    results: dict[str, Any],
) -> None:
    """Write `report.md`, `report.html` and HParams of a finished consolidation.

    Args:
        run_dir: folder of the run.
        config: its settings.
        context: the context.
        questions: the questions about it.
        results: what was measured, as written to `run.json`.
    """
    notes = build_notes(results)
    pairs = [(question.prompt, question.answer) for question in questions]
    files.atomic_write(
        run_dir / "report.md", _format_markdown(run_dir, config, context, pairs, results, notes)
    )
    page_message = write_report_safely(
        lambda: build_consolidation_page(
            run_dir, config, read_record(run_dir), context.text, pairs, notes
        ),
        run_dir / "report.html",
    )
    logger.info("report    %s; %s", run_dir / "report.md", page_message)
    if (run_dir / "student").is_dir():
        teacher = get_display_name(config.teacher)
        summary = f"{teacher} with a context consolidated into it ({describe_target(config)})."
        record = read_record(run_dir)
        write_model_card(run_dir / "student", config, record, summary, build_table(record))
    steps = config.stages.end_to_end_steps if needs_training(config) else 0
    log_hparams(config, run_dir, results, SETTING_GROUPS["consolidate"], steps)


def summarize(run_dir: Path, record: Mapping[str, Any]) -> Summary:
    """Return the results of a finished consolidation, for the command line.

    Args:
        run_dir: folder of the run.
        record: contents of its `run.json`.
    """
    report = run_dir / "report.html"
    locations = {
        "student": str(run_dir / "student"),
        "report": str(report if report.exists() else run_dir / "report.md"),
    }
    return Summary(build_table(record), build_notes(record), locations)


def build_notes(results: Mapping[str, Any]) -> list[str]:
    """Return what was written, its effect on other text, and what it cost."""
    write_stats, seconds = results["rows_written"], results["seconds"]
    if "num_rows" in write_stats:
        summary = f"{write_stats['num_facts']} facts in {write_stats['num_rows']} rows"
    else:
        summary = f"{write_stats['num_weights']:,} weights trained"
    notes = [f"written: {summary}, {write_stats['bytes']:,} bytes"]
    if false_triggers := write_stats.get("false_triggers"):
        notes.append(f"removed: {false_triggers} facts whose rows fired in unrelated text")
    for corpus, metrics in results["unrelated"].items():
        notes.append(
            f"unrelated text ({corpus}): KL {metrics['kl']:.2e} nats per token over "
            f"{metrics['tokens']:,.0f} tokens"
        )
    if cost := results.get("cost"):
        times = ", ".join(
            f"{cost[f'seconds_{method}'] * 1e3:.1f} ms {name}"
            for method, name in (
                ("context_in_prompt", "with the context in the prompt"),
                ("kv_cache", "with the context in the KV cache"),
                ("consolidated", "consolidated"),
            )
        )
        notes.append(
            f"a question: {cost['prompt_tokens_saved']:,} prompt tokens saved; {times}; "
            f"the KV cache takes {cost['kv_cache_bytes']:,} bytes"
        )
    phases = (
        ("prepare", "preparation"),
        ("consolidate", "consolidation"),
        ("measure", "evaluation"),
    )
    notes.append("time: " + ", ".join(f"{name} {seconds[phase]:.1f} s" for phase, name in phases))
    return notes


def _format_markdown(
    run_dir: Path,
    config: Config,
    context: Context,
    questions: Sequence[tuple[str, str]],
    results: Mapping[str, Any],
    notes: Sequence[str],
) -> str:
    title = f"# {run_dir.name}: {describe_target(config)}, objective {config.context.objective}"
    lines = [title, "", build_table(results).to_markdown(), ""]
    lines += [f"- {note}" for note in notes] + ["", "## Context", "", context.text, ""]
    if answers := results.get("answers"):
        lines += ["## Questions", "", build_questions_table(answers, questions).to_markdown(), ""]
    lines.append(
        f"Replay: `dmt distill {quote_path(run_dir / 'config.yaml')}`. "
        "Versions, machine and numbers: `run.json`."
    )
    return "\n".join(lines) + "\n"


def build_consolidation_page(
    run_dir: Path,
    config: Config,
    record: Mapping[str, Any],
    context: str,
    questions: Sequence[tuple[str, str]],
    notes: list[str],
) -> Page:
    """Return the page of a finished consolidation.

    Args:
        run_dir: folder of the run.
        config: its settings.
        record: contents of its `run.json`.
        context: the context.
        questions: prompts and answers, in the order of the record's.
        notes: what was written, its effect on other text, and what it cost.
    """
    steps = config.stages.end_to_end_steps if needs_training(config) else 0
    summary = (
        f"A context was consolidated into {config.teacher} ({describe_target(config)}; {steps:,} "
        "steps), so that it answers without the context as it does with it."
    )
    page = Page(
        f"{run_dir.name}: {describe_target(config)}, objective {config.context.objective}",
        summary,
        "consolidation",
        provenance=format_provenance(record),
        locations=list_run_locations(run_dir, record),
        notes=notes,
        context=context,
    )
    if not config.stages.end_to_end_steps:
        page.locations = [item for item in page.locations if item[0] != "curves"]
    for question_type, scores in record.get("question_types", {}).items():
        if scores["benefit_retained"] is not None:
            page.cards.append(
                Card(
                    format_percent(scores["benefit_retained"]),
                    f"of the context's benefit retained, {question_type}",
                    "of its effect on the log-probability of the correct answer",
                )
            )
        page.cards.append(
            Card(
                format_percent(scores["recall_consolidated"]),
                f"answered correctly, {question_type}",
                f"{scores['num_questions']} questions",
            )
        )
    for corpus, scores in record["unrelated"].items():
        page.cards.append(
            Card(
                f"{scores['kl']:.1e}",
                f"KL in nats per token of {corpus}",
                "change on text that has nothing to do with the context",
            )
        )
    table = build_table(record)
    page.tables = [Table("Results", table.columns, table.rows, table.caption)]
    if answers := record.get("answers"):
        page.tables.append(build_questions_table(answers, questions))
    page.plots = overlay_curves({"": record.get("curves", {})})
    return page
