"""What is about to happen, told before it does: the plan, and how long it will take by steps that were timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from dmt.config import Config
from dmt.data.windows import TextDataModule
from dmt.distillation.losses import Batch
from dmt.distillation.module import SCALE_TOKENS, DistillationModule
from dmt.distributed import is_distributed
from dmt.evaluation.metrics import measure_fidelity
from dmt.evaluation.samples import K_FACTORS, SAMPLE_TOKENS, SAMPLES_PER_CORPUS, SWEEP_TOKENS
from dmt.memory import AssociativeMemory, FeaturalMemory
from dmt.memory.row_table import EXACT_INDEXES, RowTable
from dmt.models.conversion import (
    TransferReport,
    get_associative_memories,
    get_featural_memories,
    get_memories,
)
from dmt.models.forward import forward_with_activations
from dmt.training.autotune import TIMED_WINDOWS
from dmt.training.trainer import use_training_kernels

TIMING_REPEATS = 3
"""Times that something is done to be timed, the fastest counts; once where that takes long."""
SLOW_SECONDS = 2.0
"""Seconds that are long."""
CALIBRATION_READS = 4
"""Readings of a token, by teacher and student, that its calibration is worth; measured with the default settings."""
PROBE_TOKENS = 12
"""Tokens of a question with its answer, about."""
LINEAR_SEARCH_ROWS, INDEX_SEARCH_ROWS, SEARCH_QUERIES = 16_384, 4_096, 256
"""Rows by which a search is timed that takes longer with each row; that hardly does; for so many tokens."""

console = Console()


@dataclass(frozen=True)
class StepTimes:
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
    evaluation: float
    generation: float
    row_search: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds that are left of a run: to calibrate, to train and to measure; and more at most, for all rows that may be stored."""

    calibrate: float
    train: float
    measure: float
    rows: float = 0.0

    @property
    def total(self) -> float:
        """All together, without rows."""
        return self.calibrate + self.train + self.measure

    def describe(self) -> str:
        """For a person."""
        more = (
            f", up to {humanize_duration(self.rows).removeprefix('about ')} more as rows are written"
            if self.rows
            else ""
        )
        return f"{humanize_duration(self.total)}{more}: {humanize_duration(self.train)} to train, the rest to calibrate and measure"


def humanize_duration(seconds: float) -> str:
    """A length of time as people say it, to a digit or two."""
    if seconds < 55:
        return f"about {max(5, 5 * round(seconds / 5))} seconds"
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} minute{'s' if seconds >= 90 else ''}"
    return f"about {seconds / 3600:.1f} hours"


def estimate_duration(
    config: Config,
    step_times: StepTimes,
    data: TextDataModule,
    is_new: bool = True,
    steps_done: int = 0,
) -> TimeEstimate:
    """How long a run takes at a pace: what is left of it after `done` steps, with calibration where it is `fresh`."""
    stages, data_config = config.stages, config.data
    layerwise = max(0, stages.layerwise_steps - steps_done)
    end_to_end = max(0, stages.end_to_end_steps - max(0, steps_done - stages.layerwise_steps))
    validation_tokens = sum(
        min(data_config.validation_tokens, corpus.validation.numel()) for corpus in data.corpora
    )
    num_probes = sum(len(corpus.probes) + len(corpus.unseen_probes) for corpus in data.corpora)
    test_tokens = sum(min(data_config.test_tokens, corpus.test.numel()) for corpus in data.corpora)
    validation_interval = config.trainer.validate_every
    num_validations = (layerwise + end_to_end) // validation_interval if validation_interval else 0
    generation_seconds = step_times.generation * len(data.corpora)
    calibration_tokens = (
        max(stages.calibration_tokens, SCALE_TOKENS) * CALIBRATION_READS + validation_tokens
    )
    evaluated_tokens = (
        test_tokens
        + PROBE_TOKENS * num_probes
        + min(SWEEP_TOKENS, test_tokens) * (len(K_FACTORS) + 1) / 2
    )
    row_seconds = 0.0
    for write_start, search_seconds in step_times.row_search:
        writing_steps = min(end_to_end, (1 - write_start) * stages.end_to_end_steps)
        # Each process reads for its share of a step's tokens, and looks for all of them whether they are new.
        searches = (
            writing_steps
            * data_config.batch_size
            * data_config.seq_len
            * (1 / config.trainer.devices + 1)
            + evaluated_tokens
        )
        row_seconds += search_seconds * (
            searches
            + (
                writing_steps // validation_interval * 2 * validation_tokens
                if validation_interval
                else 0
            )
        )
    return TimeEstimate(
        step_times.evaluation * calibration_tokens if is_new else 0.0,
        step_times.layerwise * layerwise
        + step_times.end_to_end * end_to_end
        + num_validations * (2 * step_times.evaluation * validation_tokens + generation_seconds),
        step_times.evaluation * evaluated_tokens + generation_seconds,
        row_seconds,
    )


def measure_step_times(
    config: Config, module: DistillationModule, data: TextDataModule
) -> StepTimes:
    """Take a step of each stage, and some reading, by the clock; nothing has changed afterwards."""
    student, teacher, data_config = module.student, module.teacher, config.data
    num_windows = min(TIMED_WINDOWS, data_config.micro_batch_size)
    tokens = data.calibration_windows(num_windows * data_config.seq_len)[:num_windows].to(
        module.device
    )
    num_micro_batches = data_config.batch_size / len(tokens) / config.trainer.devices
    window_ids = None
    if module.logit_cache is not None:
        first_numbers = data.window_indices_from(config.stages.layerwise_steps)[: len(tokens)]
        tokens = data.training_dataset().windows[first_numbers].to(module.device)
        window_ids = torch.tensor(first_numbers)
    batch = replace(Batch.full_step(tokens), window_ids=window_ids)
    losses: dict[str, Callable[[], Tensor]] = {
        "layerwise": lambda: module.layerwise_loss(batch)[0],
        "end_to_end": lambda: module.end_to_end_loss(batch)[0],
    }
    parameters = list(module.trainable_parameters().values())
    half = config.trainer.precision == "bf16-mixed"
    was_training = student.training
    seconds_by_stage = {}
    try:
        with torch.random.fork_rng(), use_training_kernels(config, student, teacher):
            student.train()
            for name, loss in losses.items():
                if not getattr(config.stages, f"{name}_steps"):
                    seconds_by_stage[name] = 0.0
                    continue

                def step(loss: Callable[[], Tensor] = loss) -> None:
                    with torch.autocast(module.device.type, torch.bfloat16, enabled=half):
                        value = loss()
                    torch.autograd.grad(value, parameters, allow_unused=True)

                seconds_by_stage[name] = _time_call(
                    step, module.device
                ) * num_micro_batches + _time_optimizer(parameters)
            search_times = tuple(
                (memory.write_start, _time_row_search(memory))
                for memory in get_associative_memories(student).values()
            )
        student.eval()
        evaluation_seconds = (
            _time_call(lambda: measure_fidelity(student, teacher, tokens), module.device)
            / tokens.numel()
        )
        prompts = tokens[:1, :1].expand(SAMPLES_PER_CORPUS, 1)
        generation_seconds = (
            _time_call(lambda: _predict_next(student, teacher, prompts), module.device)
            * SAMPLE_TOKENS
        )
    finally:
        student.train(was_training)
        for memory in get_featural_memories(student).values():
            memory.read_counts = None
    return StepTimes(
        seconds_by_stage["layerwise"],
        seconds_by_stage["end_to_end"],
        evaluation_seconds,
        generation_seconds,
        search_times,
    )


def _time_call(function: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(TIMING_REPEATS):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
        if (
            best > SLOW_SECONDS and not is_distributed()
        ):  # several take the same steps, as they may wait for each other in each
            break
    return best


def _time_row_search(memory: AssociativeMemory) -> float:
    """For one token among as many rows as `memory` may hold, by fewer that are made and searched in a moment."""
    is_linear = memory.rows.index in (*EXACT_INDEXES, "flat")
    num_rows = min(
        memory.insert_policy.capacity, LINEAR_SEARCH_ROWS if is_linear else INDEX_SEARCH_ROWS
    )
    rows = RowTable(memory.width, 1, num_rows, memory.rows.index).to(memory.rows.keys.device)
    rows.keys.normal_()
    rows.ids.copy_(torch.arange(num_rows))
    queries = torch.randn(SEARCH_QUERIES, memory.width, device=rows.keys.device)
    rows.search(queries, memory.k)  # which builds an index
    seconds = _time_call(lambda: rows.search(queries, memory.k), rows.keys.device) / SEARCH_QUERIES
    return seconds * memory.insert_policy.capacity / num_rows if is_linear else seconds


def _time_optimizer(parameters: list[nn.Parameter]) -> float:
    """Of AdamW for all of `learnt`, by a copy of the largest."""
    largest = max(parameters, key=lambda parameter: parameter.numel())
    clone = nn.Parameter(largest.detach().clone())
    clone.grad = torch.zeros_like(clone)
    optimizer = torch.optim.AdamW([clone], lr=0.0)
    return (
        _time_call(optimizer.step, clone.device)
        * sum(parameter.numel() for parameter in parameters)
        / clone.numel()
    )


@torch.no_grad()
def _predict_next(student: PreTrainedModel, teacher: PreTrainedModel, tokens: Tensor) -> None:
    for model in (student, teacher):
        forward_with_activations(model, tokens).logits.argmax(-1)


def print_plan(
    config: Config,
    run_dir: Path,
    student: PreTrainedModel,
    trainable: dict[str, nn.Parameter],
    transfer: TransferReport,
    estimate: TimeEstimate,
) -> None:
    """Print what is about to happen, and how long it will take."""
    stages, batch = config.stages, config.data.batch_size * config.data.seq_len
    steps = stages.layerwise_steps + stages.end_to_end_steps
    weights = sum(p.numel() for p in trainable.values())
    shape = student.config
    table = Table.grid(padding=(0, 2))
    table.add_row(
        "teacher", f"{config.teacher}: {shape.num_hidden_layers} layers, width {shape.hidden_size}"
    )
    layers_by_description: dict[str, list[int]] = {}
    for layer, memory in get_memories(student).items():
        layers_by_description.setdefault(_describe_memory(memory), []).append(layer)
    for description, layers in layers_by_description.items():
        table.add_row(f"layer {format_ranges(layers)}", f"feed-forward block -> {description}")
    table.add_row("tensors", transfer.summary())
    table.add_row(
        "trainable",
        f"{weights:,} weights in {len(trainable)} tensors (student.trainable={config.student.trainable})",
    )
    table.add_row("calibrate", f"{stages.calibration_tokens:,} tokens, no gradient")
    table.add_row("layerwise", f"{stages.layerwise_steps:,} steps, the memories alone")
    table.add_row("end_to_end", f"{stages.end_to_end_steps:,} steps")
    table.add_row(
        "text", f"{', '.join(config.data.corpora)}: {steps * batch:,} tokens in steps of {batch:,}"
    )
    table.add_row(
        "folder", f"{run_dir}; {config.trainer.num_threads} threads, {config.trainer.precision}"
    )
    table.add_row("time", estimate.describe())
    console.print(table)


def _describe_memory(memory: nn.Module | None) -> str:
    if isinstance(memory, AssociativeMemory):
        beside = "" if memory.base is None else f", beside {_describe_memory(memory.base)}"
        return f"{memory.k} of at most {memory.insert_policy.capacity:,} rows read for each token ({memory.value_target}){beside}"
    assert isinstance(memory, FeaturalMemory), "there are two kinds"
    often = "on average over layers" if memory.k_mode == "threshold" else "for each token"
    return f"{memory.k} of {memory.num_slots} slots read {often}, {memory.activation} weights, {memory.selection} ranking"


def format_ranges(numbers: list[int]) -> str:
    """Ascending whole numbers as people write them: `0-3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
