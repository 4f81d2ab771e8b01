"""Where an associative memory keeps its rows: SQL behind a small, batched interface."""

from dmt.records import Changes, Insert, Namespace, Page, Usage
from dmt.store.store import Store

__all__ = ["Changes", "Insert", "Namespace", "Page", "Store", "Usage"]
