"""Memories: layers that map hidden states `(batch, time, width)` to the same shape by reading rows."""

from dmt.memory.associative import AssociativeMemory
from dmt.memory.featural import FeaturalMemory

__all__ = ["AssociativeMemory", "FeaturalMemory"]
