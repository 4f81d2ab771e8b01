"""What a run says about itself: the plan at its start, the table at its end, `report.md`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel

from dmt import disk
from dmt.config import Config
from dmt.distill.callbacks import usage
from dmt.distill.signals import observe
from dmt.evaluate import Tally
from dmt.memory import AssociativeMemory, FeaturalMemory
from dmt.models.slots import SLOTS
from dmt.models.slots import sizes as filed_sizes
from dmt.models.surgery import TransferReport, associative_of, featural_of, memories_of

COMPARED_SETTINGS = ("student", "memory", "data", "loss", "stages", "optim")
"""Groups of settings that stand in TensorBoard's HParams."""

console = Console()


def plan(config: Config, run: Path, student: PreTrainedModel, trainable: dict[str, nn.Parameter], transfer: TransferReport) -> None:
    """Print what is about to happen."""
    stages, batch = config.stages, config.data.batch * config.data.block
    steps = stages.layerwise_steps + stages.end_to_end_steps
    weights = sum(p.numel() for p in trainable.values())
    shape = student.config
    table = Table.grid(padding=(0, 2))
    table.add_row("teacher", f"{config.teacher}: {shape.num_hidden_layers} layers, width {shape.hidden_size}")
    alike: dict[str, list[int]] = {}
    for layer, memory in memories_of(student).items():
        alike.setdefault(_what(memory), []).append(layer)
    for what, layers in alike.items():
        table.add_row(f"layer {ranges(layers)}", f"feed-forward block -> {what}")
    table.add_row("tensors", transfer.summary())
    table.add_row("trainable", f"{weights:,} weights in {len(trainable)} tensors (student.trainable={config.student.trainable})")
    table.add_row("calibrate", f"{stages.calibrate_tokens:,} tokens, no gradient")
    table.add_row("layerwise", f"{stages.layerwise_steps:,} steps, the memories alone")
    table.add_row("end_to_end", f"{stages.end_to_end_steps:,} steps")
    table.add_row("text", f"{', '.join(config.data.corpora)}: {steps * batch:,} tokens in steps of {batch:,}")
    table.add_row("folder", f"{run}; {config.trainer.threads} threads, {config.trainer.precision}")
    console.print(table)


def _what(memory: nn.Module | None) -> str:
    if isinstance(memory, AssociativeMemory):
        beside = "" if memory.base is None else f", beside {_what(memory.base)}"
        return f"{memory.k} of at most {memory.policy.capacity:,} rows read for each token ({memory.writes}){beside}"
    assert isinstance(memory, FeaturalMemory), "there are two kinds"
    often = "on average over layers" if memory.selection == "threshold" else "for each token"
    return f"{memory.k} of {memory.slots} slots read {often}, {memory.weighting} weights, {memory.ranking} ranking"


def ranges(numbers: list[int]) -> str:
    """Ascending whole numbers as people write them: `0-3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def untrained(tallies: dict[str, Tally]) -> None:
    """Print how good the student is before any gradient step."""
    for name, tally in tallies.items():
        console.print(f"before training: {name} perplexity ratio {tally.ratio:.3f}, KL {tally.kl:.3f} nats per token")


def numbers(tally: Tally) -> dict[str, float]:
    """A tally as it is written to `run.json`."""
    names = ("teacher_perplexity", "student_perplexity", "ratio", "kl", "agreement", "tokens")
    return {name: getattr(tally, name) for name in names}


def slots(student: PreTrainedModel) -> dict[str, dict[str, float]]:
    """Usage of each layer's slots since counting began; stops counting."""
    found = {}
    for layer, memory in featural_of(student).items():
        assert memory.reads is not None, "count_reads was called before the text was read"
        found[str(layer)] = usage(memory.reads) | {"slots": memory.slots, "k": memory.k}
        found[str(layer)]["read"] = float(memory.reads.sum()) / memory.reads_tokens
        memory.reads = None
    return found


@torch.no_grad()
def searched(student: PreTrainedModel, windows: Tensor) -> dict[str, float]:
    """By layer, the share of an exact search's slots that a token alone is given by one that looks for candidates.

    Whole windows are scored exactly where that is faster, so the fidelity to the teacher does not show it.
    """
    there = {layer: memory for layer, memory in featural_of(student).items() if memory.search != "exact"}
    given = observe(student, windows, blocks=True).block_inputs if there else ()
    return {str(layer): memory.recall(given[layer].flatten(0, -2)) for layer, memory in there.items()}


def stored(student: PreTrainedModel) -> dict[str, dict[str, float]]:
    """Rows of each associative memory and the base's share in what it said since listening began; stops listening."""
    found = {}
    for layer, memory in associative_of(student).items():
        assert memory.heard is not None, "listening began before the text was read"
        width = memory.rows.keys.shape[1] + memory.rows.values.shape[1]
        found[str(layer)] = {"rows": len(memory.rows), "base": memory.heard.share, "bytes": 4 * width * len(memory.rows)}
        memory.heard = None
    return found


def sizes(teacher: PreTrainedModel, student: PreTrainedModel, saved: Path) -> dict[str, int]:
    """Bytes of weights in memory, and of the student saved in the folder `saved` on disk.

    Of slots that are in a file of their own, what is held of them in RAM counts as in memory.
    """
    models = {"teacher": teacher, "student": student}
    held = {name: sum(p.numel() * p.element_size() for p in model.parameters()) for name, model in models.items()}
    there = [memory for memory in featural_of(student).values() if memory.filed is not None]
    held["student"] += sum(memory.filed_sizes()["ram"] for memory in there)
    files, left = ["model.safetensors", *([SLOTS] if there else [])], filed_sizes(student)["disk"]
    held["student_on_disk"] = sum((saved / file).stat().st_size for file in files)
    return held | ({"student_left_on_disk": left} if left else {})


def hyperparameters(config: Config, run: Path, results: dict[str, Any]) -> None:
    """HParams for TensorBoard, written once, with the results they led to."""
    groups = {group: members for group, members in asdict(config).items() if group in COMPARED_SETTINGS}
    settings: dict[str, Any] = {"teacher": config.teacher, "seed": config.seed}
    for group, members in groups.items():
        settings |= {f"{group}.{name}": value for name, value in members.items() if isinstance(value, bool | int | float | str)}
    used = results["slots"].values()
    settings |= {f"memory.{name}": max((u[name] for u in used), default=0) for name in ("k", "slots")}
    metrics: dict[str, float] = {}
    for corpus, found in results["fidelity"].items():
        metrics |= {f"hparam/{corpus}_{name}": found[name] for name in ("ratio", "kl", "agreement")}
    with SummaryWriter(str(run)) as board:
        board.add_hparams(settings, metrics, run_name=".")


def rows(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The table: measure, teacher, student, and how they compare."""
    table = []
    for corpus, found in results["fidelity"].items():
        teacher, student = f"{found['teacher_perplexity']:.3f}", f"{found['student_perplexity']:.3f}"
        table.append((f"{corpus}: perplexity", teacher, student, f"ratio {found['ratio']:.4f}"))
        table.append((f"{corpus}: KL, nats/token", "0", f"{found['kl']:.4f}", ""))
        table.append((f"{corpus}: same top-1 token", "1", f"{found['agreement']:.4f}", ""))
        for name, title in (("recall", "facts recalled"), ("recall_unseen", "in unseen phrasings")):
            if said := found.get(name):
                share = f"{said['student'] / said['teacher']:.4f} of it" if said["teacher"] else ""
                table.append((f"{corpus}: {title}", f"{said['teacher']:.4f}", f"{said['student']:.4f}", share))
    used, size = results["slots"].values(), results["bytes"]
    if used:
        read, held, dead = (sum(u[name] for u in used) for name in ("read", "slots", "dead"))
        by_layer = ", ".join(f"{u['read']:.0f}" for u in used)
        table.append(("slots read per token", f"{held:,}", f"{read:,.1f}", f"1 / {held / read:.1f}"))
        table.append(("layer by layer", "", by_layer if len(used) <= 12 else "", by_layer if len(used) > 12 else ""))
        table.append(("dead slots", "", f"{dead:.0f}", f"{dead / held:.2%}"))
    if found := [u["recall"] for u in used if "recall" in u]:
        table.append(("found of what an exact search reads", "", f"{sum(found) / len(found):.4f}", f"least {min(found):.4f}"))
    for layer, kept in results.get("rows", {}).items():
        table.append((f"rows of layer {layer}", "", f"{kept['rows']:,}", f"{kept['base']:.0%} is the base's"))
    megabytes = {name: f"{number / 1e6:.1f}" for name, number in size.items()}
    on_disk = f"{megabytes['student_on_disk']} on disk"
    on_disk += f", of which {megabytes['student_left_on_disk']} stay there" if "student_left_on_disk" in size else ""
    table.append(("weights in memory, MB", megabytes["teacher"], megabytes["student"], on_disk))
    return table


def finish(run: Path, results: dict[str, Any], texts: dict[str, str]) -> None:
    """Print the table and where everything is; write `report.md`."""
    table = Table(title="teacher and student on the same test text")
    for heading in ("", "teacher", "student", ""):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows(results):
        table.add_row(*row)
    console.print(table)
    notes = [_measured(corpus, found) for corpus, found in results["fidelity"].items()] + [_spent(results)]
    places = {"curves": f"tensorboard --logdir {run.parent}", "student": str(run / "student"), "report": str(run / "report.md")}
    console.print(
        "\n".join(notes), *(f"\n{name:8} {place}" for name, place in places.items()), highlight=False, sep="", soft_wrap=True
    )
    disk.write(run / "report.md", _markdown(run, results, notes, texts))


def _markdown(run: Path, results: dict[str, Any], notes: list[str], texts: dict[str, str]) -> str:
    lines = [f"# {run.name}", "", "| | teacher | student | |", "|---|---:|---:|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(results)] + [""]
    lines += [f"- {note}" for note in notes] + [""]
    for corpus, text in texts.items():
        lines += [f"## {corpus}: how both go on", "", text, ""]
    lines.append(
        f"Replay: `python distill.py {run}/config.yaml`. What produced this: `run.json`; tensor by tensor: `transfer.txt`."
    )
    return "\n".join(lines) + "\n"


def _measured(corpus: str, found: dict[str, Any]) -> str:
    window = f"{found['windows']} windows of {found['window']} tokens, stride {found['stride']}"
    asked = f", {found['recall']['probes']:,} questions" if "recall" in found else ""
    return f"{corpus}: {window}, {found['tokens']:,.0f} predicted tokens{asked}"


def _spent(results: dict[str, Any]) -> str:
    seconds, tokens = results["seconds"], results["tokens"]
    spent = ", ".join(f"{seconds[part]:.0f} s to {part}" for part in ("prepare", "train", "measure"))
    return f"trained on {tokens['trained']:,} tokens, {tokens['per_second']:,.0f} a second; {spent}"
