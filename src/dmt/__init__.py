"""Discrete memory transformers: GPT-2 and Llama whose feed-forward blocks are memories.

`import dmt` is cheap: the names below import their module (and torch) when they are first used.
It also lets transformers' Auto classes load saved students.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from dmt._autoregister import register_auto_classes

__version__ = "0.1.0"

# Public name -> module that defines it.
_EXPORTS = {
    "AssociativeConfig": "dmt.config",
    "AssociativeMemory": "dmt.memory.associative",
    "Comparison": "dmt.report.compare",
    "Config": "dmt.config",
    "ConsolidationResult": "dmt.consolidation.run",
    "DenseConfig": "dmt.config",
    "DistillResult": "dmt.distillation.run",
    "ExpertsConfig": "dmt.config",
    "ExpertsMemory": "dmt.memory.experts",
    "FeaturalConfig": "dmt.config",
    "FeaturalMemory": "dmt.memory.featural",
    "FidelityMetrics": "dmt.evaluation.metrics",
    "InsertPolicy": "dmt.memory.insert_policy",
    "LowRankConfig": "dmt.config",
    "LowRankMemory": "dmt.memory.low_rank",
    "Memory": "dmt.editing.fact_store",
    "MemoryConfig": "dmt.config",
    "MemoryLayer": "dmt.memory.base",
    "NgramConfig": "dmt.config",
    "NgramMemory": "dmt.memory.ngram",
    "NoMemory": "dmt.memory.none",
    "NoMemoryConfig": "dmt.config",
    "PeerConfig": "dmt.config",
    "PeerMemory": "dmt.memory.peer",
    "ProductKeyConfig": "dmt.config",
    "ProductKeyMemory": "dmt.memory.product_key",
    "PrunedConfig": "dmt.config",
    "PrunedMemory": "dmt.memory.pruned",
    "SumConfig": "dmt.config",
    "SumMemory": "dmt.memory.sum",
    "TokenConfig": "dmt.config",
    "TokenMemory": "dmt.memory.token",
    "TokenTrace": "dmt.evaluation.trace",
    "SlotTransferResult": "dmt.consolidation.sleep",
    "TranscoderConfig": "dmt.config",
    "TranscoderMemory": "dmt.memory.transcoder",
    "UserError": "dmt.errors",
    "bounded": "dmt.validation",
    "compare": "dmt.report.compare",
    "consolidate": "dmt.consolidation.run",
    "convert": "dmt.models.conversion",
    "distill": "dmt.distillation.run",
    "evaluate": "dmt.evaluation.metrics",
    "load": "dmt.editing.loading",
    "register_architecture": "dmt.models.modeling",
    "register_corpus": "dmt.data.corpora",
    "register_loss": "dmt.distillation.losses",
    "register_memory": "dmt.memory.registry",
    "register_store": "dmt.store.rows",
    "trace": "dmt.evaluation.trace",
    "transfer_to_slots": "dmt.consolidation.sleep",
}

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'dmt' has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})


register_auto_classes()
