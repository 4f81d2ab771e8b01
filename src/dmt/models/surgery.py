"""Clone a teacher, put memories where its feed-forward blocks were, and account for every tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.config import MemoryConfig
from dmt.errors import UserError
from dmt.layers import has_slots
from dmt.memory import AssociativeMemory, FeaturalMemory
from dmt.memory.finding import INDEXES
from dmt.memory.weighting import ACTIVATIONS
from dmt.models.architectures import Architecture, architecture_of
from dmt.models.modeling import build_student
from dmt.models.resize import resized

DEFAULT_SHARE = 16
"""k = slots / 16 where the config leaves k empty."""


@dataclass(frozen=True)
class Transfer:
    """What became of one tensor: `copied`, `memory` (a slot's part), `dropped` (teacher only) or `new` (student only)."""

    tensor: str
    fate: str
    into: str
    elements: int


@dataclass(frozen=True)
class TransferReport:
    """Every tensor of teacher and student, once."""

    transfers: list[Transfer]

    def summary(self) -> str:
        """One line: tensors and their elements by fate; a tied matrix counts under each of its names."""
        tensors: Counter[str] = Counter()
        weights: Counter[str] = Counter()
        for transfer in self.transfers:
            tensors[transfer.fate] += 1
            weights[transfer.fate] += transfer.elements
        return ", ".join(f"{tensors[fate]} {fate} ({weights[fate]:,} weights)" for fate in ("copied", "memory", "new", "dropped"))

    def table(self) -> str:
        """One line per tensor."""
        return "\n".join(f"{t.fate:8} {t.tensor:40} {t.into:48} {t.elements:>12,}" for t in self.transfers)


def transplant(
    teacher: PreTrainedModel, memories: list[MemoryConfig], block_inputs: Sequence[Tensor] | None = None
) -> tuple[PreTrainedModel, TransferReport]:
    """A student equal to `teacher` but for the blocks that `memories` (one entry per layer) turns into memories.

    With `init: ff`, activation weighting and k = slots its logits are the teacher's up to rounding, unless there are
    fewer slots than neurons.

    Args:
        block_inputs: what the teacher's blocks are given on calibration text, `(..., width)` a layer; needed where
            `slots` is not the block's number of neurons.

    Raises:
        UserError: a memory does not fit the block it replaces.
        RuntimeError: a tensor of either model is not accounted for.
    """
    arch = architecture_of(teacher.config.model_type)
    blocks = arch.blocks(teacher)
    assert len(blocks) == len(memories), "one memory setting per layer"
    chosen = {layer: memory for layer, memory in enumerate(memories) if memory.kind != "dense"}
    slots = {layer: _arguments(layer, memory, arch, teacher) for layer, memory in chosen.items() if has_slots(memory)}
    plan = {
        str(layer): {"rows": _rows(memory), "base": slots.get(layer)} if memory.kind == "associative" else slots[layer]
        for layer, memory in chosen.items()
    }
    student = build_student(teacher.config, plan, arch.no_dropout)
    parts = {layer: _parts(layer, chosen[layer], arch, teacher, slots[layer], block_inputs) for layer in slots}
    report = _transfer(teacher, student, arch, chosen, parts)
    return student.eval(), report


def memories_of(student: PreTrainedModel) -> dict[int, FeaturalMemory | AssociativeMemory]:
    """The memories of a student, of either kind, by layer."""
    blocks = architecture_of(student.config.model_type).blocks(student)
    return {layer: block for layer, block in enumerate(blocks) if isinstance(block, FeaturalMemory | AssociativeMemory)}


def featural_of(student: PreTrainedModel) -> dict[int, FeaturalMemory]:
    """The featural memories of a student by layer, those that are the base of an associative one included."""
    found = {
        layer: memory.base if isinstance(memory, AssociativeMemory) else memory for layer, memory in memories_of(student).items()
    }
    return {layer: memory for layer, memory in found.items() if isinstance(memory, FeaturalMemory)}


def associative_of(student: PreTrainedModel) -> dict[int, AssociativeMemory]:
    """The associative memories of a student by layer."""
    return {layer: memory for layer, memory in memories_of(student).items() if isinstance(memory, AssociativeMemory)}


def _arguments(layer: int, memory: MemoryConfig, arch: Architecture, teacher: PreTrainedModel) -> dict[str, Any]:
    activation = getattr(teacher.config, arch.activation)
    if memory.weighting == "activation" and activation not in ACTIVATIONS:
        raise UserError(
            f"teacher: its blocks use {activation!r}; memories know {', '.join(ACTIVATIONS)}; set memory.weighting=relu"
        )
    if arch.gated and memory.weighting in ("softmax", "distance"):
        raise UserError(
            f"memory.weighting={memory.weighting} knows no gains, and the blocks of this teacher are gated; use activation or relu"
        )
    if arch.gated and memory.search in INDEXES:
        raise UserError(
            f"memory.search={memory.search} knows one key for each slot, and the blocks of this teacher are gated, with two; "
            "use exact or int8"
        )
    block_slots = len(arch.read(arch.blocks(teacher)[layer])["keys"])
    slots = memory.slots or block_slots
    auto = memory.k == "auto"
    asked = memory.budget if memory.k == "auto" else memory.k
    k = asked or max(memory.heads, slots // DEFAULT_SHARE // memory.heads * memory.heads)
    if k > slots:
        raise UserError(f"memory.{'budget' if auto else 'k'} must be in [1, {slots}] for layer {layer} of this teacher, got {k}")
    if slots % memory.heads:
        raise UserError(f"memory.heads={memory.heads} must divide the {slots} slots of layer {layer}")
    return {
        "slots": slots, "k": k, "heads": memory.heads, "weighting": memory.weighting,
        "activation": activation, "ranking": memory.ranking,
        "metric": "plain" if memory.ranking == "score" else memory.metric,
        "selection": "threshold" if auto else "top", "gradient": memory.gradient,
        "projections": memory.projections, "linear": memory.linear, "search": memory.search,
        "value_type": memory.value_type, "disk": memory.disk,
    }  # fmt: skip


def _rows(memory: MemoryConfig) -> dict[str, Any]:
    """Arguments of an `AssociativeMemory` but for its width and base, as they stand in a student's config."""
    policy = {"novelty": memory.novelty, "recombine": memory.recombine, "capacity": memory.capacity, "decay": memory.forgetting}
    return {
        "k": memory.neighbours, "writes": memory.writes, "policy": policy, "places": 0, "index": memory.index,
        "write_from": memory.write_from,
    }  # fmt: skip


@torch.no_grad()
def _parts(
    layer: int,
    memory: MemoryConfig,
    arch: Architecture,
    teacher: PreTrainedModel,
    arguments: dict[str, Any],
    block_inputs: Sequence[Tensor] | None,
) -> dict[str, Tensor]:
    """What the block of `layer` gives to its memory, resized where the memory has fewer or more slots."""
    parts = arch.read(arch.blocks(teacher)[layer])
    neurons, width = parts["keys"].shape
    if memory.init != "ff" or arguments["slots"] == neurons:
        return parts
    if block_inputs is None:
        raise ValueError(f"{arguments['slots']} slots for {neurons} neurons need block_inputs: what the blocks are given")
    whole = FeaturalMemory(width, neurons, neurons, activation=arguments["activation"], gated=arch.gated, ranking="score")
    whole.load_feedforward(parts)
    hidden = block_inputs[layer].reshape(-1, width).to(parts["keys"].device)
    whole.to(hidden)
    weights = whole.weights(hidden, whole.scores(hidden))
    return resized(parts, weights, arguments["slots"], memory.fewer, memory.more, seed=layer)


@torch.no_grad()
def _transfer(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    arch: Architecture,
    memories: dict[int, MemoryConfig],
    parts: dict[int, dict[str, Tensor]],
) -> TransferReport:
    given, wanted = teacher.state_dict(), student.state_dict()
    transfers: list[Transfer] = []
    filled: set[str] = set()
    for layer, memory in memories.items():
        name = arch.block_name(layer)
        block, mine = arch.blocks(teacher)[layer], arch.blocks(student)[layer]
        slots = mine.base if isinstance(mine, AssociativeMemory) else mine
        taken_over = isinstance(slots, FeaturalMemory) and memory.init == "ff"
        inside = f"{name}.base" if isinstance(mine, AssociativeMemory) else name
        if taken_over:
            slots.load_feedforward(parts[layer])  # type: ignore[union-attr,operator]
        for part, taken in arch.read(block).items():
            source = f"{name}.{arch.tensors[part]}"
            if taken_over:
                transfers.append(Transfer(source, "memory", f"{inside}.{part}", taken.numel()))
                filled.add(f"{inside}.{part}")
            else:
                transfers.append(Transfer(source, "dropped", "-", taken.numel()))
        for part in mine.state_dict():
            if f"{name}.{part}" not in filled:
                transfers.append(Transfer("-", "new", f"{name}.{part}", wanted[f"{name}.{part}"].numel()))
                filled.add(f"{name}.{part}")
    accounted = {transfer.tensor for transfer in transfers}
    for tensor, value in given.items():
        if tensor in accounted:
            continue
        if tensor not in wanted or wanted[tensor].shape != value.shape:
            raise RuntimeError(f"surgery: teacher tensor {tensor} {tuple(value.shape)} has no place in the student")
        wanted[tensor].copy_(value)  # a view of the student's parameter
        transfers.append(Transfer(tensor, "copied", tensor, value.numel()))
        filled.add(tensor)
    if missing := sorted(set(wanted) - filled):
        raise RuntimeError(f"surgery: student tensors were given nothing: {', '.join(missing)}")
    return TransferReport(transfers)
