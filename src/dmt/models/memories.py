"""The memories of a student, by layer and kind."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from dmt.memory import AssociativeMemory, FeaturalMemory, SumMemory
from dmt.memory.base import MemoryLayer
from dmt.memory.token_context import list_contexts
from dmt.memory.usage import UsageMixin
from dmt.models.architectures import get_architecture


def get_memories(student: PreTrainedModel) -> dict[int, MemoryLayer]:
    """Return the memories of a student, of whatever kind, by layer."""
    blocks = get_architecture(student.config.model_type).blocks(student)
    return {layer: block for layer, block in enumerate(blocks) if isinstance(block, MemoryLayer)}


def get_featural_memories(student: PreTrainedModel) -> dict[int, FeaturalMemory]:
    """Return the featural memories of a student by layer, bases of associative ones included."""
    return {
        layer: memory
        for layer, memory in get_slot_memories(student).items()
        if isinstance(memory, FeaturalMemory)
    }


def get_slot_memories(student: PreTrainedModel) -> dict[int, UsageMixin]:
    """Return the memories whose reads of slots are counted, by layer.

    They may be the base of an associative memory, or a part of a sum, see `find_slot_memory`.
    """
    memories: dict[int, UsageMixin] = {}
    for layer, memory in get_memories(student).items():
        slots = find_slot_memory(memory)
        if slots is not None:
            memories[layer] = slots
    return memories


def find_slot_memory(memory: Any) -> UsageMixin | None:
    """Return the memory with slots in a layer: itself, its base, or a part with slots.

    Of the parts the featural one, which is calibrated by layer, else the first.
    """
    if isinstance(memory, AssociativeMemory):
        memory = memory.base
    parts = memory.list_parts() if isinstance(memory, SumMemory) else [memory]
    with_slots = [part for part in parts if isinstance(part, UsageMixin)]
    featural = [part for part in with_slots if isinstance(part, FeaturalMemory)]
    return next(iter(featural + with_slots), None)


def get_context_length(student: PreTrainedModel) -> int:
    """Return how many of the last token ids the memories of a student read."""
    return max((memory.context_length for memory in get_memories(student).values()), default=0)


def list_student_contexts(student: PreTrainedModel, tokens: Tensor) -> Tensor | None:
    """Return what `use_contexts` takes for memories that are called on their own.

    Args:
        student: whose memories they are.
        tokens: token ids `(batch, time)` from the start of a text.

    Returns:
        Contexts `(batch, time, length)`; None where no memory reads token ids.
    """
    length = get_context_length(student)
    return list_contexts(tokens, length) if length else None


def get_associative_memories(student: PreTrainedModel) -> dict[int, AssociativeMemory]:
    """Return the associative memories of a student by layer."""
    return {
        layer: memory
        for layer, memory in get_memories(student).items()
        if isinstance(memory, AssociativeMemory)
    }
