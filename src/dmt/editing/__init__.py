"""Facts: written into a model without changing a weight, searched, deleted and packed."""

from dmt.editing.edit import WriteResult
from dmt.editing.fact import Fact, parse_fact
from dmt.editing.fact_store import FactStore, Memory

__all__ = [
    "Fact",
    "FactStore",
    "Memory",
    "WriteResult",
    "parse_fact",
]
