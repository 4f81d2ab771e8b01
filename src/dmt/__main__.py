"""Run `dmt` as `python -m dmt`."""

from dmt.cli.main import run

run()
