"""What a text begins with, for a model."""

from __future__ import annotations

from typing import Any

MEMORY_TOKEN = "<|memory_{}|>"
"""How memory tokens (`models/tokens.py`) are written."""


def start_of(tokenizer: Any) -> list[int]:
    """Token ids that stand before a document: the one that ends the document before it, where a tokenizer has one, and memory."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    count = getattr(tokenizer, "init_kwargs", {}).get("memory_tokens", 0)
    return end + [tokenizer.convert_tokens_to_ids(MEMORY_TOKEN.format(number)) for number in range(count)]
