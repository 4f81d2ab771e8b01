"""What a config asks for, done: distil, consolidate or pretrain."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytorch_lightning as pl

from dmt.config import Config
from dmt.consolidation.run import consolidate
from dmt.distillation.run import distill, pretrain
from dmt.errors import UserError
from dmt.signals import SignalInterrupt, get_signal_number
from dmt.training.checkpoints import set_aside_damaged_checkpoints
from dmt.training.interrupts import RunInterrupted, report_disk_errors
from dmt.training.launch import distributed_context, get_rank, resolve_device_count
from dmt.training.run_dir import current_run, lock_run, save_changed_config, unlock_runs
from dmt.training.trainer import check_accelerator, silence_libraries

TASKS = {"distill": distill, "consolidate": consolidate, "pretrain": pretrain}
"""What to call for each `task`."""


def run_task(config: Config, resume_dir: Path | None = None) -> Path:
    """Do what `config.task` says, going on in `folder` where one is given; the run's folder.

    Raises:
        SystemExit: a signal came, by its code; how to go on has been said.
        UserError: a mistake that a person can mend, too little memory, or another program works in the folder.
    """
    silence_libraries()
    config = resolve_device_count(config)
    check_accelerator(config)
    try:
        with report_disk_errors(config.trainer.log_dir):
            if resume_dir is not None and get_rank() == 0:
                lock_run(resume_dir)
                set_aside_damaged_checkpoints(resume_dir)
                save_changed_config(resume_dir, config)
            try:
                with distributed_context(config, resume_dir):
                    pl.seed_everything(config.seed, workers=True, verbose=False)
                    return TASKS[config.task](config, resume_dir)
            except KeyboardInterrupt as interruption:
                if isinstance(interruption, SignalInterrupt) or (run_dir := current_run()) is None:
                    raise
                raise RunInterrupted(get_signal_number(interruption), run_dir) from None
    except RunInterrupted as interruption:
        print(interruption, file=sys.stderr)
        raise SystemExit(128 + interruption.signum) from None
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(
            "(can't allocate|out of) memory", str(error)
        ):
            raise
        size_match = re.search(r"[\d.]+ ?([GM]iB|bytes)", str(error))
        raise UserError(
            f"there is not enough memory for this run{f' (a piece of {size_match[0]} was asked for)' if size_match else ''}; set a smaller "
            "data.micro_batch_size, data.seq_len or memory.num_slots, or take a smaller teacher"
        ) from None
    finally:
        unlock_runs()


def run_task_as_command(config: Config, resume_dir: Path | None = None) -> int:
    """`carry_out`, for a command: the exit code."""
    try:
        run_task(config, resume_dir)
    except SystemExit as system_exit:
        return int(system_exit.code or 0)
    return 0
