"""The mutation check: chosen lines are broken one by one, and tests should notice each.

Run it with `python -m tests.mutations`.
"""
