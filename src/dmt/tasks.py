"""What a config asks for, done: distil, consolidate or pretrain."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytorch_lightning as pl

from dmt.config import Config
from dmt.consolidation.run import consolidate
from dmt.distill.fitting import Interrupted, check_accelerator, check_checkpoint, quiet
from dmt.distill.processes import counted, joined
from dmt.distill.run import distil, pretrain
from dmt.errors import UserError

TASKS = {"distill": distil, "consolidate": consolidate, "pretrain": pretrain}
"""What to call for each `task`."""


def carry_out(config: Config, folder: Path | None = None) -> Path:
    """Do what `config.task` says, going on in `folder` where one is given; the run's folder.

    Raises:
        SystemExit: a signal came, by its code; how to go on has been said.
        UserError: a mistake that a person can mend, or too little memory.
    """
    quiet()
    config = counted(config)
    check_accelerator(config)
    if folder is not None:
        check_checkpoint(folder)
    try:
        with joined(config, folder):
            pl.seed_everything(config.seed, workers=True, verbose=False)
            return TASKS[config.task](config, folder)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        raise SystemExit(128 + stopped.number) from None
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("(can't allocate|out of) memory", str(error)):
            raise
        asked = re.search(r"[\d.]+ ?([GM]iB|bytes)", str(error))
        raise UserError(
            f"there is not enough memory for this run{f' (a piece of {asked[0]} was asked for)' if asked else ''}; set a smaller "
            "data.micro_batch, data.block or memory.slots, or take a smaller teacher"
        ) from None


def run(config: Config, folder: Path | None = None) -> int:
    """`carry_out`, for a command: the exit code."""
    try:
        carry_out(config, folder)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0
