"""SQL storage of associative rows and of facts, behind a small, batched interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dmt.store.records import Namespace, RowBatch, RowInsert, RowUsage, StepChanges

if TYPE_CHECKING:
    from dmt.store.rows import RowStore

__all__ = ["Namespace", "RowBatch", "RowInsert", "RowStore", "RowUsage", "StepChanges"]


def __getattr__(name: str) -> Any:
    # Models import the records; only a store that is opened needs SQLAlchemy (0.2 s to import).
    if name == "RowStore":
        from dmt.store.rows import RowStore

        return RowStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
