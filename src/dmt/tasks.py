"""What a config asks for, done: distil, consolidate or pretrain."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytorch_lightning as pl

from dmt.config import Config
from dmt.consolidation.run import consolidate
from dmt.distill.checkpoints import check_checkpoints
from dmt.distill.ending import Interrupted, told_of_disks
from dmt.distill.fitting import check_accelerator, quiet
from dmt.distill.folder import hold_run, keep_changes, let_go_of_runs, run_in_hand
from dmt.distill.processes import counted, joined, rank
from dmt.distill.run import distil, pretrain
from dmt.errors import UserError
from dmt.stopping import Stopped, number_of

TASKS = {"distill": distil, "consolidate": consolidate, "pretrain": pretrain}
"""What to call for each `task`."""


def carry_out(config: Config, folder: Path | None = None) -> Path:
    """Do what `config.task` says, going on in `folder` where one is given; the run's folder.

    Raises:
        SystemExit: a signal came, by its code; how to go on has been said.
        UserError: a mistake that a person can mend, too little memory, or another program works in the folder.
    """
    quiet()
    config = counted(config)
    check_accelerator(config)
    try:
        with told_of_disks(config.trainer.log_dir):
            if folder is not None and rank() == 0:
                hold_run(folder)
                check_checkpoints(folder)
                keep_changes(folder, config)
            try:
                with joined(config, folder):
                    pl.seed_everything(config.seed, workers=True, verbose=False)
                    return TASKS[config.task](config, folder)
            except KeyboardInterrupt as stopped:
                if isinstance(stopped, Stopped) or (run := run_in_hand()) is None:
                    raise
                raise Interrupted(number_of(stopped), run) from None
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
    finally:
        let_go_of_runs()


def run(config: Config, folder: Path | None = None) -> int:
    """`carry_out`, for a command: the exit code."""
    try:
        carry_out(config, folder)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0
