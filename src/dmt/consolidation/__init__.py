"""Move a context into memory or weights, and stored facts from memory into weights."""
