"""The memories of a student, by layer and kind."""

from __future__ import annotations

from transformers import PreTrainedModel

from dmt.memory import AssociativeMemory, FeaturalMemory
from dmt.memory.base import MemoryLayer
from dmt.models.architectures import get_architecture


def get_memories(student: PreTrainedModel) -> dict[int, MemoryLayer]:
    """Return the memories of a student, of whatever kind, by layer."""
    blocks = get_architecture(student.config.model_type).blocks(student)
    return {layer: block for layer, block in enumerate(blocks) if isinstance(block, MemoryLayer)}


def get_featural_memories(student: PreTrainedModel) -> dict[int, FeaturalMemory]:
    """Return the featural memories of a student by layer, bases of associative ones included."""
    memories = {
        layer: memory.base if isinstance(memory, AssociativeMemory) else memory
        for layer, memory in get_memories(student).items()
    }
    return {
        layer: memory for layer, memory in memories.items() if isinstance(memory, FeaturalMemory)
    }


def get_associative_memories(student: PreTrainedModel) -> dict[int, AssociativeMemory]:
    """Return the associative memories of a student by layer."""
    return {
        layer: memory
        for layer, memory in get_memories(student).items()
        if isinstance(memory, AssociativeMemory)
    }
