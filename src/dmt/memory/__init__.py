"""Memory layers: `(batch, time, width)` to the same shape, by reading rows."""

from dmt.memory.associative import AssociativeMemory
from dmt.memory.featural import FeaturalMemory
from dmt.memory.insert_policy import InsertPolicy

__all__ = ["AssociativeMemory", "FeaturalMemory", "InsertPolicy"]
