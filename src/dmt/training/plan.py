"""The summary of a run that is logged before it starts: model, memories, steps, text, folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dmt.config import Config
from dmt.data.documents import format_counts
from dmt.evaluation.cost import MemoryCost, sum_costs
from dmt.memory import AssociativeMemory, FeaturalMemory, NgramMemory, SumMemory, TokenMemory
from dmt.memory.usage import UsageMixin
from dmt.models.conversion import TransferReport
from dmt.models.memories import get_memories


def format_plan(
    config: Config,
    run_dir: Path,
    student: PreTrainedModel,
    trainable: dict[str, nn.Parameter],
    transfer: TransferReport,
    corpora: Sequence[Mapping[str, Any]],
) -> str:
    """Return what a distillation is about to do, one line per part.

    Args:
        config: The resolved settings.
        run_dir: Folder of the run.
        student: The converted model.
        trainable: Its trainable parameters by name.
        transfer: What became of each tensor of the teacher.
        corpora: What was read of each corpus, see `TextDataModule.to_record`.
    """
    stages, step_tokens = config.stages, config.data.batch_size * config.data.seq_len
    steps = stages.layerwise_steps + stages.end_to_end_steps
    num_weights = sum(parameter.numel() for parameter in trainable.values())
    shape = student.config
    rows = [
        (
            "teacher",
            f"{config.teacher}: {shape.num_hidden_layers} layers, width {shape.hidden_size}",
        ),
        *(
            (f"layer {format_ranges(layers)}", f"feed-forward block -> {description}")
            for description, layers in _group_layers(student).items()
        ),
        ("tensors", transfer.summary()),
        (
            "trainable",
            f"{num_weights:,} weights in {len(trainable)} tensors"
            f" (student.trainable={config.student.trainable})",
        ),
        ("calibrate", f"{stages.calibration_tokens:,} tokens, no gradient"),
        ("layerwise", f"{stages.layerwise_steps:,} steps, the memories alone"),
        ("end_to_end", f"{stages.end_to_end_steps:,} steps"),
        (
            "text",
            f"{', '.join(config.data.corpora)}: {steps * step_tokens:,} tokens"
            f" in steps of {step_tokens:,}",
        ),
        *((f"corpus {corpus['name']}", describe_corpus(corpus)) for corpus in corpora),
        (
            "folder",
            f"{run_dir}; {config.trainer.num_threads} threads, {config.trainer.precision}",
        ),
    ]
    return format_rows(rows)


def format_costs(
    student: PreTrainedModel, costs: Mapping[int, MemoryCost], dense_costs: Mapping[int, MemoryCost]
) -> str:
    """Return what a memory of a student costs on average, one line per group of like layers.

    Args:
        student: the student.
        costs: of its layers.
        dense_costs: of the same layers of the teacher.
    """
    rows = []
    for layers in _group_layers(student).values():
        cost, dense = (
            sum_costs(layer_costs[layer] for layer in layers)
            for layer_costs in (costs, dense_costs)
        )
        num_bytes, count = cost.read_bytes_per_token, len(layers)
        share = num_bytes / dense.read_bytes_per_token
        parts = [f"reads {num_bytes / count / 1e3:,.1f} kB per token, {share:.1%} of dense"]
        if cost.reads_per_token is not None:
            parts.append(f"{cost.reads_per_token / count:,.1f} rows")
        parts.append(f"{cost.multiply_adds / count:,.0f} multiply-adds")
        parts.append(f"{cost.ram_bytes / count / 1e6:,.2f} MB in RAM")
        if cost.disk_bytes:
            parts.append(f"{cost.disk_bytes / count / 1e6:,.2f} MB on disk")
        rows.append((f"cost of {format_ranges(layers)}", ", ".join(parts)))
    return format_rows(rows)


def describe_corpus(corpus: Mapping[str, Any]) -> str:
    """Return what was read of a corpus, what was skipped, and what stands in it twice.

    Args:
        corpus: An item of `TextDataModule.to_record`, as `run.json` has it under `corpora`.
    """
    tokens, source = corpus["tokens"], corpus["source"]
    splits = ", ".join(f"{name} {count:,}" for name, count in tokens.items())
    parts = [
        f"{source['files']:,} files" if source["files"] else "",
        f"{corpus['documents']:,} documents",
        f"{corpus['characters']:,} characters",
        f"{sum(tokens.values()):,} tokens ({splits})" if tokens else "",
    ]
    overlap = (
        "in different splits, because nearly all text is alike: test results are too good"
        if source["has_overlap"]
        else "in the same split as what they are like"
    )
    notes = [
        f"split by {source['unit']}" if source["unit"] not in ("", "documents") else "",
        source["chats"],
        f"skipped: {format_counts(source['skipped'])}" if source["skipped"] else "",
        f"{source['copies']:,} copies removed" if source["copies"] else "",
        f"{source['near_duplicates']:,} near duplicates, {overlap}"
        if source["near_duplicates"]
        else "",
        f"{source['shared']:,} documents of validation and test are training text"
        if source["shared"]
        else "",
    ]
    return "; ".join(filter(None, [", ".join(filter(None, parts)), *notes]))


def format_rows(rows: list[tuple[str, str]]) -> str:
    """Return names and values in two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _group_layers(student: PreTrainedModel) -> dict[str, list[int]]:
    """Return the layers with memories, by what the memories are."""
    groups: dict[str, list[int]] = {}
    for layer, memory in get_memories(student).items():
        groups.setdefault(_describe_memory(memory), []).append(layer)
    return groups


def _describe_memory(memory: nn.Module | None) -> str:
    if isinstance(memory, AssociativeMemory):
        base = "" if memory.base is None else f", beside {_describe_memory(memory.base)}"
        return (
            f"{memory.k} of at most {memory.insert_policy.capacity:,} rows read for each token"
            f" ({memory.value_target}){base}"
        )
    if isinstance(memory, FeaturalMemory):
        basis = "on average over layers" if memory.k_mode == "threshold" else "for each token"
        return (
            f"{memory.k} of {memory.num_slots} slots read {basis}, {memory.activation} weights,"
            f" {memory.selection} ranking"
        )
    if isinstance(memory, UsageMixin):
        return f"{memory.k} of {memory.num_slots} slots read for each token ({memory.kind})"
    if isinstance(memory, SumMemory):
        return " + ".join(map(_describe_memory, memory.list_parts()))
    if isinstance(memory, NgramMemory):
        return (
            f"{memory.hash_heads} rows read for each of the last 1 to {memory.order} tokens (ngram)"
        )
    if isinstance(memory, TokenMemory):
        return "1 row read for each token (token)"
    return type(memory).__name__


def format_ranges(numbers: list[int]) -> str:
    """Format ascending whole numbers as ranges, as in `0-3, 7`."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    return ", ".join(
        f"{values[0]}-{values[-1]}" if len(values) > 1 else str(values[0]) for values in ranges
    )
