"""What a run says about itself: the plan at its start, the table at its end, `report.md`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from dmt.config import Config
from dmt.distill.callbacks import usage
from dmt.evaluate import Tally
from dmt.models.surgery import TransferReport, memories_of

SCALE_TOKENS = 4_096
"""Least number of tokens from which the teacher's variances are measured."""

console = Console()


def plan(config: Config, run: Path, student: nn.Module, trainable: dict[str, nn.Parameter], transfer: TransferReport) -> None:
    """Print what is about to happen."""
    stages, batch = config.stages, config.data.batch * config.data.block
    steps = stages.layerwise_steps + stages.end_to_end_steps
    table = Table.grid(padding=(0, 2))
    table.add_row("teacher", f"{config.teacher}: {student.config.num_hidden_layers} layers, width {student.config.hidden_size}")
    for layer, memory in memories_of(student).items():
        table.add_row(
            f"layer {layer}",
            f"feed-forward block -> featural memory, {memory.k} of {memory.slots} slots read, {memory.weighting} weights, ranked by {memory.ranking}",
        )
    table.add_row("tensors", transfer.summary())
    table.add_row("trainable", f"{sum(p.numel() for p in trainable.values()):,} weights in {len(trainable)} tensors (student.trainable={config.student.trainable})")
    table.add_row("stages", f"calibrate on {stages.calibrate_tokens:,} tokens, layer-wise {stages.layerwise_steps:,} steps, end to end {stages.end_to_end_steps:,} steps")
    table.add_row("text", f"{', '.join(config.data.corpora)}; {steps * batch:,} tokens in steps of {batch:,}; {config.trainer.threads} threads")
    table.add_row("folder", str(run))
    console.print(table)


def untrained(tallies: dict[str, Tally]) -> None:
    """Print how good the student is before any gradient step."""
    for name, tally in tallies.items():
        console.print(f"calibrated, untrained: {name} perplexity ratio {tally.ratio:.3f}, KL {tally.kl:.3f} nats per token")


def numbers(tally: Tally) -> dict[str, float]:
    """A tally as it is written to `run.json`."""
    return {
        "teacher_perplexity": tally.teacher_perplexity, "student_perplexity": tally.student_perplexity, "ratio": tally.ratio,
        "kl": tally.kl, "agreement": tally.agreement, "tokens": tally.tokens,
    }  # fmt: skip


def slots(student: nn.Module) -> dict[str, dict[str, float]]:
    """Usage of each layer's slots since counting began; stops counting."""
    found = {}
    for layer, memory in memories_of(student).items():
        assert memory.reads is not None, "count_reads was called before the text was read"
        found[str(layer)] = usage(memory.reads) | {"slots": memory.slots, "k": memory.k}
        memory.reads = None
    return found


def sizes(teacher: nn.Module, student: nn.Module, saved: Path) -> dict[str, int]:
    """Bytes of weights in memory and of the saved student on disk."""
    ram = {name: sum(p.numel() * p.element_size() for p in model.parameters()) for name, model in (("teacher", teacher), ("student", student))}
    return {**ram, "student_on_disk": saved.stat().st_size}


def hyperparameters(config: Config, run: Path, results: dict[str, Any]) -> None:
    """HParams for TensorBoard, written once, with the results they led to."""
    settings = {
        f"{group}.{name}": value
        for group, members in asdict(config).items() if isinstance(members, dict) and group in ("memory", "loss", "stages", "optim", "student")
        for name, value in members.items() if isinstance(value, bool | int | float | str)
    } | {"teacher": config.teacher, "seed": config.seed}  # fmt: skip
    metrics = {f"hparam/{corpus}_{name}": found[name] for corpus, found in results["fidelity"].items() for name in ("ratio", "kl", "agreement")}
    with SummaryWriter(str(run)) as board:
        board.add_hparams(settings, metrics, run_name=".")


def rows(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The table: measure, teacher, student, and how they compare."""
    table = []
    for corpus, found in results["fidelity"].items():
        table.append((f"{corpus}: perplexity", f"{found['teacher_perplexity']:.3f}", f"{found['student_perplexity']:.3f}", f"ratio {found['ratio']:.4f}"))
        table.append((f"{corpus}: KL, nats per token", "0", f"{found['kl']:.4f}", ""))
        table.append((f"{corpus}: same top-1 token", "1", f"{found['agreement']:.4f}", ""))
        if said := found.get("recall"):
            share = said["student"] / said["teacher"] if said["teacher"] else float("nan")
            table.append((f"{corpus}: fact recall, {said['probes']:,} questions", f"{said['teacher']:.4f}", f"{said['student']:.4f}", f"{share:.4f} of the teacher's"))
    used = results["slots"].values()
    read, held = sum(u["k"] for u in used), sum(u["slots"] for u in used)
    table.append(("slots read per token, all memories", f"{held:,}", f"{read:,}", f"1 / {held / read:.0f}"))
    table.append(("dead slots", "", f"{sum(u['dead'] for u in used):.0f}", f"{sum(u['dead'] for u in used) / held:.2%}"))
    size = results["bytes"]
    table.append(("weights in memory, MB", f"{size['teacher'] / 1e6:.1f}", f"{size['student'] / 1e6:.1f}", f"{size['student_on_disk'] / 1e6:.1f} on disk"))
    return table


def finish(config: Config, run: Path, results: dict[str, Any], texts: dict[str, str]) -> None:
    """Print the table and where everything is; write `report.md`."""
    table = Table(title="teacher and student on the same test text")
    for heading in ("", "teacher", "student", ""):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in rows(results):
        table.add_row(*row)
    console.print(table)
    seconds, tokens = results["seconds"], results["tokens"]
    told = [
        *(
            f"{corpus}: {found['windows']} windows of {found['window']} tokens, stride {found['stride']}, {found['tokens']:,.0f} predicted tokens"
            for corpus, found in results["fidelity"].items()
        ),
        f"trained on {tokens['trained']:,} tokens at {tokens['per_second']:,.0f} a second; "
        f"{seconds['prepare']:.0f} s to prepare, {seconds['train']:.0f} s to train, {seconds['measure']:.0f} s to measure",
        f"curves   tensorboard --logdir {run.parent}",
        f"student  {run / 'student'}",
        f"report   {run / 'report.md'}",
    ]
    console.print("\n".join(told), highlight=False)
    markdown = ["# " + run.name, "", "| | teacher | student | |", "|---|---:|---:|---|", *("| " + " | ".join(row) + " |" for row in rows(results)), ""]
    markdown += [f"- {line}" for line in told] + [""]
    for corpus, text in texts.items():
        markdown += [f"## {corpus}: how both go on", "", text, ""]
    markdown += [f"Replay: `python distill.py {run}/config.yaml`. What produced this: `run.json`, tensor by tensor: `transfer.txt`.", ""]
    (run / "report.md").write_text("\n".join(markdown), encoding="utf-8")
