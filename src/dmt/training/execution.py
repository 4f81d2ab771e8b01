"""Run the function of a task: checks before it, locks and processes around it, errors after it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl

from dmt.config import Config
from dmt.errors import UserError
from dmt.signals import SignalInterrupt, get_signal_number
from dmt.training.checkpoints import set_aside_damaged_checkpoints
from dmt.training.interrupts import RunInterrupted, report_disk_errors
from dmt.training.launch import distributed_context, get_rank, resolve_device_count
from dmt.training.run_dir import current_run, lock_run, save_changed_config, unlock_runs
from dmt.training.trainer import (
    check_accelerator,
    check_loggers,
    prepare_determinism,
    quiet_libraries,
)

# Takes the settings and the folder of a run to resume, or None; returns the folder of the run.
Task = Callable[[Config, Path | None], Path]


def execute(task: Task, config: Config, resume_dir: Path | None = None) -> Path:
    """Run a task; print nothing and install no signal handler. It works in any thread.

    Args:
        task: The function to run.
        config: The resolved settings.
        resume_dir: Folder of a run to resume.

    Returns:
        The folder of the run.

    Raises:
        UserError: A setting does not fit, memory runs out, the disk fails, or another process
            works on the run.
        RunInterrupted: A `KeyboardInterrupt` after the run has begun; the message says how to
            resume it.
    """
    check_accelerator(config)
    config = resolve_device_count(config, resume_dir)
    check_accelerator(config)
    check_loggers(config)
    try:
        with quiet_libraries(), report_disk_errors(config.trainer.log_dir):
            if resume_dir is not None and get_rank() == 0:
                lock_run(resume_dir)
                set_aside_damaged_checkpoints(resume_dir)
                save_changed_config(resume_dir, config)
            try:
                with distributed_context(config), prepare_determinism():
                    pl.seed_everything(config.seed, workers=True, verbose=False)
                    return task(config, resume_dir)
            except SignalInterrupt:
                raise
            except KeyboardInterrupt as interrupt:
                if (run_dir := current_run()) is None:
                    raise
                raise RunInterrupted(get_signal_number(interrupt), run_dir) from None
    except (MemoryError, RuntimeError) as error:
        # torch has no class of its own for a failed allocation on the CPU.
        if not isinstance(error, MemoryError) and not re.search(
            "(can't allocate|out of) memory", str(error)
        ):
            raise
        size_match = re.search(r"[\d.]+ ?([GM]iB|bytes)", str(error))
        size = f" ({size_match[0]} were requested)" if size_match else ""
        raise UserError(
            f"there is not enough memory for this run{size}; set a smaller data.micro_batch_size,"
            " data.seq_len or memory.num_slots, or take a smaller teacher"
        ) from None
    finally:
        unlock_runs()
