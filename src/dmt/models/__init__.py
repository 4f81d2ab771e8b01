"""Models: what is inside one, converting to memories, saving and loading students."""
