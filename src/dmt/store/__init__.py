"""Where an associative memory keeps its rows: SQL behind a small, batched interface."""

from dmt.store.records import Namespace, RowBatch, RowInsert, RowUsage, StepChanges
from dmt.store.rows import RowStore

__all__ = ["StepChanges", "RowInsert", "Namespace", "RowBatch", "RowStore", "RowUsage"]
