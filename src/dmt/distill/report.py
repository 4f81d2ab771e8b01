"""What a run says about itself at its end: what was measured, the table, `report.md`, `report.html`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel

from dmt import disk
from dmt.config import Config
from dmt.distill.callbacks import usage
from dmt.distill.continuing import Continuation
from dmt.distill.continuing import table as continuations_table
from dmt.distill.folder import read_record
from dmt.distill.signals import observe
from dmt.evaluate import Tally
from dmt.models.slots import SLOTS
from dmt.models.slots import sizes as filed_sizes
from dmt.models.surgery import associative_of, featural_of
from dmt.pages.distilled import distilled, notes
from dmt.pages.page import leave
from dmt.wording import shown

COMPARED_SETTINGS = ("student", "memory", "data", "loss", "stages", "optim")
"""Groups of settings that stand in TensorBoard's HParams."""

CELLS = 4_096
"""Most numbers by which the usage of one layer's slots is written down."""

console = Console()


def untrained(tallies: dict[str, Tally]) -> None:
    """Print how good the student is before any gradient step."""
    for name, tally in tallies.items():
        console.print(f"before training: {name} perplexity ratio {tally.ratio:.3f}, KL {tally.kl:.3f} nats per token")


def numbers(tally: Tally) -> dict[str, float]:
    """A tally as it is written to `run.json`."""
    names = ("teacher_perplexity", "student_perplexity", "ratio", "kl", "agreement", "tokens")
    return {name: getattr(tally, name) for name in names}


def cells(reads: Tensor) -> dict[str, Any]:
    """Reads per slot `(slots,)` as a list of at most `CELLS`, each the sum over `reads_of` slots that stand together."""
    each = -(-len(reads) // CELLS)
    return {"reads": [int(part.sum()) for part in reads.cpu().split(each)], "reads_of": each}


def slots(student: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """Usage of each layer's slots since counting began; stops counting."""
    found = {}
    for layer, memory in featural_of(student).items():
        assert memory.reads is not None, "count_reads was called before the text was read"
        found[str(layer)] = usage(memory.reads) | {"slots": memory.slots, "k": memory.k}
        found[str(layer)]["read"] = float(memory.reads.sum()) / memory.reads_tokens
        found[str(layer)] |= cells(memory.reads) | {"tokens": memory.reads_tokens}
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


def variant(config: Config, groups: Iterable[str]) -> dict[str, bool | int | float | str]:
    """Settings that may tell one run from another, by dotted name; lists in words, and `default` for what is left empty."""
    found: dict[str, Any] = {"teacher": config.teacher, "seed": config.seed}
    for group in groups:
        for name, value in asdict(getattr(config, group)).items():
            plain = value if isinstance(value, bool | int | float | str) else "default" if value is None else shown(value)
            found[f"{group}.{name}"] = plain
    return found


def hyperparameters(config: Config, run: Path, results: dict[str, Any]) -> None:
    """HParams for TensorBoard, written once, with the results they led to, at the step they were measured after."""
    settings = variant(config, COMPARED_SETTINGS)
    used = results["slots"].values()
    settings |= {f"memory.{name}": max(u[name] for u in used) for name in ("k", "slots") if used}
    metrics: dict[str, float] = {}
    for corpus, found in results["fidelity"].items():
        metrics |= {f"hparam/{corpus}_{name}": found[name] for name in ("ratio", "kl", "agreement")}
        metrics |= {f"hparam/{corpus}_{name}": found[name]["student"] for name in ("recall", "recall_unseen") if name in found}
    if used:
        metrics |= {"hparam/slots_read": sum(u["read"] for u in used), "hparam/slots_dead": sum(u["dead"] for u in used)}
    if stored := results.get("rows"):
        metrics["hparam/rows"] = sum(kept["rows"] for kept in stored.values())
    with SummaryWriter(str(run)) as board:
        steps = config.stages.layerwise_steps + config.stages.end_to_end_steps
        board.add_hparams(settings, metrics, run_name=".", global_step=steps)


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


def finish(run: Path, config: Config, results: dict[str, Any], said: dict[str, list[Continuation]]) -> None:
    """Print the table and where everything is; write `report.md`, then `report.html`."""
    table = Table(title="teacher and student on the same test text")
    for heading in ("", "teacher", "student", ""):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows(results):
        table.add_row(*row)
    console.print(table)
    record = read_record(run)
    told = notes(record)
    texts = {corpus: continuations_table(found) for corpus, found in said.items()}
    disk.write(run / "report.md", _markdown(run, results, told, texts))
    page = leave(lambda: distilled(run, config, record), run / "report.html")
    places = {
        "curves": f"tensorboard --logdir {run.parent}",
        "student": str(run / "student"),
        "report": f"{run / 'report.md'}; {page}",
    }
    console.print(
        "\n".join(told), *(f"\n{name:8} {place}" for name, place in places.items()), highlight=False, sep="", soft_wrap=True
    )


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
