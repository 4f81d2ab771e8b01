"""`python -m dmt`, the same as `dmt`."""

from dmt.cli.main import run

run()
