"""Which stored fact a text asks for: the names in it, whom it is about, and what it asks."""
