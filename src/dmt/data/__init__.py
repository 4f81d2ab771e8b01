"""Text to windows of token ids."""
