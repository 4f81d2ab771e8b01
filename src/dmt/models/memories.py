"""The memories of a student, by layer and kind."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from dmt.memory import AssociativeMemory, FeaturalMemory
from dmt.memory.base import MemoryLayer
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
    """Return the memories whose reads of slots are counted, by layer; bases included."""
    memories: dict[int, Any] = {
        layer: memory.base if isinstance(memory, AssociativeMemory) else memory
        for layer, memory in get_memories(student).items()
    }
    return {layer: memory for layer, memory in memories.items() if isinstance(memory, UsageMixin)}


def get_associative_memories(student: PreTrainedModel) -> dict[int, AssociativeMemory]:
    """Return the associative memories of a student by layer."""
    return {
        layer: memory
        for layer, memory in get_memories(student).items()
        if isinstance(memory, AssociativeMemory)
    }
