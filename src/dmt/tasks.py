"""What a config asks for, done: distil, consolidate or pretrain, to an exit code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytorch_lightning as pl

from dmt.config import Config
from dmt.consolidation.run import consolidate
from dmt.distill.fitting import Interrupted, check_accelerator, quiet
from dmt.distill.run import distil, pretrain

TASKS = {"distill": distil, "consolidate": consolidate, "pretrain": pretrain}
"""What to call for each `task`."""


def run(config: Config, folder: Path | None = None) -> int:
    """Do what `config.task` says, going on in `folder` where one is given; the exit code."""
    quiet()
    check_accelerator(config)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    try:
        TASKS[config.task](config, folder)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.number
    return 0
