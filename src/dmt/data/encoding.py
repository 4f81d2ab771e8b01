"""What a text begins with, for a model."""

from __future__ import annotations

from typing import Any


def start_of(tokenizer: Any) -> list[int]:
    """Token ids that stand before a document: the one that ends the document before it, where a tokenizer has one."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
