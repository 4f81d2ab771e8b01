"""What is about to happen, told before it does: the plan, and how long it will take by steps that were timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from dmt.config import Config
from dmt.data.blocks import TextData
from dmt.distill.budgets import FACTORS, TOKENS
from dmt.distill.continuing import SAMPLE_TOKENS, SAMPLES_PER_CORPUS
from dmt.distill.fitting import computing
from dmt.distill.losses import Batch
from dmt.distill.module import SCALE_TOKENS, Distiller
from dmt.distill.signals import observe
from dmt.distill.timing import WINDOWS
from dmt.evaluate import compare
from dmt.memory import AssociativeMemory, FeaturalMemory
from dmt.memory.rows import PLAIN, Rows
from dmt.memory.together import several
from dmt.models.surgery import TransferReport, associative_of, featural_of, memories_of

TIMED = 3
"""Times that something is done to be timed, the fastest counts; once where that takes long."""
LONG = 2.0
"""Seconds that are long."""
CALIBRATION = 4
"""Readings of a token, by teacher and student, that its calibration is worth; measured with the default settings."""
PROBE = 12
"""Tokens of a question with its answer, about."""
SEARCHED, INDEXED, QUERIES = 16_384, 4_096, 256
"""Rows by which a search is timed that takes longer with each row; that hardly does; for so many tokens."""

console = Console()


@dataclass(frozen=True)
class Pace:
    """Seconds that things take on this machine.

    Attributes:
        layerwise, end_to_end: one optimiser step of each stage, 0 where there is none.
        reading: one token of held-out text, by teacher and student.
        saying: both going on from the prompts of one corpus.
        searching: of each associative memory the share of the training before it writes, and what a token's search takes
            once it is full.
    """

    layerwise: float
    end_to_end: float
    reading: float
    saying: float
    searching: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Estimate:
    """Seconds that are left of a run: to calibrate, to train and to measure; and more at most, for all rows that may be stored."""

    calibrate: float
    train: float
    measure: float
    rows: float = 0.0

    @property
    def total(self) -> float:
        """All together, without rows."""
        return self.calibrate + self.train + self.measure

    def words(self) -> str:
        """For a person."""
        more = f", up to {about(self.rows).removeprefix('about ')} more as rows are written" if self.rows else ""
        return f"{about(self.total)}{more}: {about(self.train)} to train, the rest to calibrate and measure"


def about(seconds: float) -> str:
    """A length of time as people say it, to a digit or two."""
    if seconds < 55:
        return f"about {max(5, 5 * round(seconds / 5))} seconds"
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} minute{'s' if seconds >= 90 else ''}"
    return f"about {seconds / 3600:.1f} hours"


def estimated(config: Config, pace: Pace, data: TextData, fresh: bool = True, done: int = 0) -> Estimate:
    """How long a run takes at a pace: what is left of it after `done` steps, with calibration where it is `fresh`."""
    stages, settings = config.stages, config.data
    layerwise = max(0, stages.layerwise_steps - done)
    end_to_end = max(0, stages.end_to_end_steps - max(0, done - stages.layerwise_steps))
    held = sum(min(settings.validation_tokens, corpus.validation.numel()) for corpus in data.corpora)
    asked = sum(len(corpus.probes) + len(corpus.unseen_probes) for corpus in data.corpora)
    tests = sum(min(settings.test_tokens, corpus.test.numel()) for corpus in data.corpora)
    every = config.trainer.validate_every
    checks = (layerwise + end_to_end) // every if every else 0
    said = pace.saying * len(data.corpora)
    calibration = max(stages.calibrate_tokens, SCALE_TOKENS) * CALIBRATION + held
    measured = tests + PROBE * asked + min(TOKENS, tests) * (len(FACTORS) + 1) / 2
    rows = 0.0
    for begins, searching in pace.searching:
        writing = min(end_to_end, (1 - begins) * stages.end_to_end_steps)
        # Each process reads for its share of a step's tokens, and looks for all of them whether they are new.
        searched = writing * settings.batch * settings.block * (1 / config.trainer.devices + 1) + measured
        rows += searching * (searched + (writing // every * 2 * held if every else 0))
    return Estimate(
        pace.reading * calibration if fresh else 0.0,
        pace.layerwise * layerwise + pace.end_to_end * end_to_end + checks * (2 * pace.reading * held + said),
        pace.reading * measured + said,
        rows,
    )


def timed(config: Config, module: Distiller, data: TextData) -> Pace:
    """Take a step of each stage, and some reading, by the clock; nothing has changed afterwards."""
    student, teacher, settings = module.student, module.teacher, config.data
    rows = min(WINDOWS, settings.micro_batch)
    tokens = data.calibration_windows(rows * settings.block)[:rows].to(module.device)
    pieces = settings.batch / len(tokens) / config.trainer.devices
    numbers = None
    if module.cache is not None:
        first = data.numbers_from(config.stages.layerwise_steps)[: len(tokens)]
        tokens, numbers = data.training_windows().windows[first].to(module.device), torch.tensor(first)
    batch = Batch.whole(tokens)
    ways: dict[str, Callable[[], Tensor]] = {
        "layerwise": lambda: module._layerwise(batch)["loss"],
        "end_to_end": lambda: module._end_to_end(batch, numbers)["loss"],
    }
    learnt = list(module.trainable().values())
    half = config.trainer.precision == "bf16-mixed"
    kept = {name: buffer.clone() for name, buffer in module.named_buffers() if name.startswith("idle_")}
    was_training = student.training
    found = {}
    try:
        with torch.random.fork_rng(), computing(config, student, teacher):
            student.train()
            for name, loss in ways.items():
                if not getattr(config.stages, f"{name}_steps"):
                    found[name] = 0.0
                    continue

                def step(loss: Callable[[], Tensor] = loss) -> None:
                    with torch.autocast(module.device.type, torch.bfloat16, enabled=half):
                        value = loss()
                    torch.autograd.grad(value, learnt, allow_unused=True)

                found[name] = _seconds(step, module.device) * pieces + _optimiser_seconds(learnt)
            searching = tuple((memory.write_from, _search_seconds(memory)) for memory in associative_of(student).values())
        student.eval()
        reading = _seconds(lambda: compare(student, teacher, tokens), module.device) / tokens.numel()
        prompts = tokens[:1, :1].expand(SAMPLES_PER_CORPUS, 1)
        saying = _seconds(lambda: _read(student, teacher, prompts), module.device) * SAMPLE_TOKENS
    finally:
        student.train(was_training)
        for name, buffer in kept.items():
            module.get_buffer(name).copy_(buffer)
        for memory in featural_of(student).values():
            memory.reads = None
    return Pace(found["layerwise"], found["end_to_end"], reading, saying, searching)


def _seconds(act: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(TIMED):
        began = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
        if best > LONG and not several():  # several take the same steps, as they may wait for each other in each
            break
    return best


def _search_seconds(memory: AssociativeMemory) -> float:
    """For one token among as many rows as `memory` may hold, by fewer that are made and searched in a moment."""
    linear = memory.rows.index in (*PLAIN, "flat")
    held = min(memory.policy.capacity, SEARCHED if linear else INDEXED)
    rows = Rows(memory.width, 1, held, memory.rows.index).to(memory.rows.keys.device)
    rows.keys.normal_()
    rows.ids.copy_(torch.arange(held))
    queries = torch.randn(QUERIES, memory.width, device=rows.keys.device)
    rows.search(queries, memory.k)  # which builds an index
    taken = _seconds(lambda: rows.search(queries, memory.k), rows.keys.device) / QUERIES
    return taken * memory.policy.capacity / held if linear else taken


def _optimiser_seconds(learnt: list[nn.Parameter]) -> float:
    """Of AdamW for all of `learnt`, by a copy of the largest."""
    largest = max(learnt, key=lambda parameter: parameter.numel())
    copy = nn.Parameter(largest.detach().clone())
    copy.grad = torch.zeros_like(copy)
    optimizer = torch.optim.AdamW([copy], lr=0.0)
    return _seconds(optimizer.step, copy.device) * sum(parameter.numel() for parameter in learnt) / copy.numel()


@torch.no_grad()
def _read(student: PreTrainedModel, teacher: PreTrainedModel, tokens: Tensor) -> None:
    for model in (student, teacher):
        observe(model, tokens).logits.argmax(-1)


def plan(
    config: Config,
    run: Path,
    student: PreTrainedModel,
    trainable: dict[str, nn.Parameter],
    transfer: TransferReport,
    estimate: Estimate,
) -> None:
    """Print what is about to happen, and how long it will take."""
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
    table.add_row("time", estimate.words())
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
