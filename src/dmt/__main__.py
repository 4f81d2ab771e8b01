"""`python -m dmt`, the same as `dmt`."""

from dmt.cli import run

run()
