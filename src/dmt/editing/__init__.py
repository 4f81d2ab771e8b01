"""Facts: written into a model by one gradient each, without changing a weight; read, forgotten, given away."""

from dmt.editing.edit import WriteResult
from dmt.editing.fact import Fact, parse_fact
from dmt.editing.fact_store import FactStore, open_fact_store, resolve_student_folder

__all__ = [
    "FactStore",
    "Fact",
    "WriteResult",
    "parse_fact",
    "open_fact_store",
    "resolve_student_folder",
]
