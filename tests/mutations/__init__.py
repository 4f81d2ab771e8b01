"""A mutation check: chosen lines of the product are broken one by one, and tests should notice. `python -m tests.mutations`."""
