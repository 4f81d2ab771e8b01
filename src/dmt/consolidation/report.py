"""What a consolidation says about itself: the plan, the table with context, without and consolidated, `report.md`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel

from dmt import disk
from dmt.config import Config
from dmt.consolidation.asking import Question
from dmt.consolidation.hearing import after
from dmt.consolidation.reading import Context
from dmt.distill.folder import read_record
from dmt.distill.report import variant
from dmt.facts.states import encoded
from dmt.pages.consolidated import consolidated
from dmt.pages.page import leave

TIMED = 12
"""Questions by which seconds are measured, one at a time."""

console = Console()


def trains(config: Config) -> bool:
    """Whether there are gradient steps: not where rows are written in one pass."""
    return config.context.into != "memory" or config.context.write == "trained"


def destination(config: Config) -> str:
    """Where the context goes, in words."""
    settings = config.context
    return {
        "memory": f"memory: rows, by {'training' if settings.write == 'trained' else f'the {settings.write} in one pass'}",
        "weights": f"weights: {settings.weights}" + (f", rank {settings.rank}" if settings.weights == "lora" else ""),
        "tokens": f"tokens: {settings.tokens} embeddings before every text",
    }[settings.into]


def plan(config: Config, run: Path, context: Context, questions: Sequence[Question], steps: int, facts: int) -> None:
    """Print what is about to happen."""
    table = Table.grid(padding=(0, 2))
    windows = f", read in {len(context.windows)} windows" if len(context.windows) > 1 else ""
    table.add_row("model", config.teacher)
    table.add_row("context", f"{config.context.file or 'context.text'}: {context.tokens:,} tokens{windows}")
    table.add_row("into", destination(config))
    table.add_row(
        "objective", f"{config.context.objective}, {steps:,} steps" if steps else f"{config.context.objective}, no gradient steps"
    )
    table.add_row("questions", f"{len(questions)}")
    if facts and config.context.into != "memory":
        table.add_row("facts", f"the {facts:,} rows of facts of {config.teacher} stay there: they know its weights alone")
    table.add_row("folder", str(run))
    console.print(table)


def cost(work: Any, student: PreTrainedModel, before: Sequence[int]) -> dict[str, float]:
    """Tokens, bytes and seconds a question: the context in every prompt, kept in the cache, and consolidated.

    Of several windows the cache has all, a prompt the longest.
    """
    hearing = max(work.hearings, key=lambda each: len(each.ids))
    asked = [
        torch.tensor([encoded(work.tokenizer, question.prompt, start=False)], device=work.device)
        for question in work.questions[:TIMED]
    ]
    ways: dict[str, Callable[[torch.Tensor], Any]] = {
        "in every prompt": lambda tokens: after(work.base, hearing.ids, tokens),
        "in the cache": hearing.signals,
        "consolidated": lambda tokens: after(student, before, tokens),
    }
    seconds = {}
    for name, say in ways.items():
        took = []
        for tokens in asked:
            began = time.perf_counter()
            seen = say(tokens)
            seen.head(seen.hidden[:, -1:])
            took.append(time.perf_counter() - began)
        seconds[f"seconds {name}"] = sorted(took)[len(took) // 2]
    held = sum(each.bytes for each in work.hearings)
    return {"prompt tokens saved": len(hearing.ids) - len(before), "bytes of the cache": held, **seconds}


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table: kind of question, how many, log-probability and recall without, with, consolidated; share kept."""
    return [
        (
            kind,
            str(found["questions"]),
            *(
                f"{found[f'log_probability_{name}']:.2f} / {found[f'recall_{name}']:.2f}"
                for name in ("without", "with", "consolidated")
            ),
            "-" if found["share"] is None else f"{found['share']:.3f}",
        )
        for kind, found in results.get("kinds", {}).items()
    ]


HEADINGS = ("questions", "", "without", "with context", "consolidated", "share kept")


def finish(run: Path, config: Config, context: Context, questions: Sequence[Question], results: dict[str, Any]) -> None:
    """Print the table and where everything is; write `report.md`, `report.html` and the figures for TensorBoard."""
    table = Table(title="log-probability of the right answer / share that would be said")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "questions" else "right")
    for row in rows(results):
        table.add_row(*row)
    if questions:
        console.print(table)
    notes = _notes(results)
    disk.write(run / "report.md", _markdown(run, config, context, questions, results, notes))
    asked, where = [(question.prompt, question.answer) for question in questions], destination(config)
    page = leave(lambda: consolidated(run, config, read_record(run), context.text, asked, notes, where), run / "report.html")
    places = {"student": str(run / "student"), "report": page}
    console.print(
        "\n".join(notes), *(f"\n{name:8} {place}" for name, place in places.items()), highlight=False, sep="", soft_wrap=True
    )
    kinds, steps = results.get("kinds", {}), config.stages.end_to_end_steps if trains(config) else 0
    metrics = {f"hparam/share_{kind}": found["share"] for kind, found in kinds.items() if found["share"] is not None}
    metrics |= {f"hparam/{corpus}_kl": found["kl"] for corpus, found in results["unrelated"].items()}
    settings = variant(config, ("context", "stages", "loss"))
    with SummaryWriter(str(run)) as board:
        board.add_hparams(settings, metrics, run_name=".", global_step=steps)


def _notes(results: dict[str, Any]) -> list[str]:
    written, seconds = results["written"], results["seconds"]
    what = f"{written['facts']} facts in {written['rows']} rows" if "rows" in written else f"{written['weights']:,} weights trained"
    notes = [f"written: {what}, {written['bytes']:,} bytes"]
    if loose := written.get("loose"):
        notes.append(f"taken out again: {loose} facts whose rows answered in unrelated text, where nobody asked")
    for corpus, found in results["unrelated"].items():
        notes.append(f"unrelated text ({corpus}): KL {found['kl']:.2e} nats per token over {found['tokens']:,.0f} tokens")
    if found := results.get("cost"):
        notes.append(
            f"a question: {found['prompt tokens saved']:,} prompt tokens saved; "
            + ", ".join(
                f"{found[f'seconds {way}'] * 1e3:.1f} ms {way}" for way in ("in every prompt", "in the cache", "consolidated")
            )
            + f"; the cache takes {found['bytes of the cache']:,} bytes"
        )
    notes.append("spent: " + ", ".join(f"{seconds[part]:.1f} s to {part}" for part in ("prepare", "consolidate", "measure")))
    return notes


def _markdown(
    run: Path, config: Config, context: Context, questions: Sequence[Question], results: dict[str, Any], notes: list[str]
) -> str:
    lines = [f"# {run.name}: {destination(config)}, objective {config.context.objective}", ""]
    lines += ["| " + " | ".join(HEADINGS) + " |", "|---|---:|---:|---:|---:|---:|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(results)] + [""]
    lines += [
        "Log-probability of the right answer / share that greedy decoding would say. Share kept: of what the context does for",
        "log-probability.",
        "",
    ]
    lines += [f"- {note}" for note in notes] + ["", "## Context", "", context.text, ""]
    if said := results.get("answers"):
        lines += ["## Questions", "", "| prompt | answer | without | with context | consolidated |", "|---|---|---:|---:|---:|"]
        for i, question in enumerate(questions):
            cells = (
                f"{-said[name]['nats'][i]:.2f}{' ✓' if said[name]['right'][i] else ''}"
                for name in ("without", "with", "consolidated")
            )
            texts = (text.replace("|", "/").replace("\n", " ") for text in (question.prompt, question.answer))
            lines.append("| " + " | ".join([*texts, *cells]) + " |")
        lines.append("")
    lines.append(f"Replay: `python distill.py {run}/config.yaml`. What produced this: `run.json`.")
    return "\n".join(lines) + "\n"
