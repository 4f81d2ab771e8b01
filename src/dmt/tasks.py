"""What a config asks for, done: distil, consolidate or pretrain."""

from __future__ import annotations

import sys
from pathlib import Path

import pytorch_lightning as pl

from dmt.config import Config
from dmt.consolidation.run import consolidate
from dmt.distill.fitting import Interrupted, check_accelerator, quiet
from dmt.distill.processes import counted, joined
from dmt.distill.run import distil, pretrain

TASKS = {"distill": distil, "consolidate": consolidate, "pretrain": pretrain}
"""What to call for each `task`."""


def carry_out(config: Config, folder: Path | None = None) -> Path:
    """Do what `config.task` says, going on in `folder` where one is given; the run's folder.

    Raises:
        SystemExit: a signal came, by its code; how to go on has been said.
    """
    quiet()
    config = counted(config)
    check_accelerator(config)
    try:
        with joined(config, folder):
            pl.seed_everything(config.seed, workers=True, verbose=False)
            return TASKS[config.task](config, folder)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        raise SystemExit(128 + stopped.number) from None


def run(config: Config, folder: Path | None = None) -> int:
    """`carry_out`, for a command: the exit code."""
    try:
        carry_out(config, folder)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0
