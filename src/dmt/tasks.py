"""Run what a config asks for: distill or consolidate."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from dmt.config import Config
from dmt.errors import UserError
from dmt.signals import SignalInterrupt, get_signal_number, stop_at_step_end
from dmt.training.checkpoints import set_aside_damaged_checkpoints
from dmt.training.interrupts import (
    RunInterrupted,
    hide_disk_errors_in_threads,
    report_disk_errors,
)
from dmt.training.launch import distributed_context, get_rank, resolve_device_count
from dmt.training.run_dir import (
    current_run,
    lock_run,
    read_record,
    save_changed_config,
    unlock_runs,
)
from dmt.training.trainer import (
    check_accelerator,
    check_loggers,
    quiet_libraries,
    silence_libraries,
)

Task = Callable[[Config, Path | None], Path]  # from settings and a folder to resume to a folder

# Function of each task, imported when it runs: they are built on this package.
TASKS = {
    "distill": "dmt.distillation.run:run_distillation",
    "consolidate": "dmt.consolidation.run:consolidate",
}


@dataclass(frozen=True)
class TaskResult:
    """What a finished run left behind.

    Attributes:
        run_dir: Its folder, with `run.json`, curves, checkpoints and the report.
    """

    run_dir: Path

    @property
    def student(self) -> Path | None:
        """The folder of the saved student, or None for a task that makes none."""
        return path if (path := self.run_dir / "student").is_dir() else None

    @property
    def record(self) -> dict[str, Any]:
        """The content of `run.json`: settings, versions and all results."""
        return read_record(self.run_dir)


def run_task(
    config: Config, resume_dir: Path | None = None, task: Task | None = None
) -> TaskResult:
    """Do what `config.task` says; print nothing and install no signal handler.

    Progress is logged under `dmt.training` and `dmt.distillation`. It works in any thread.

    Args:
        config: The resolved settings.
        resume_dir: Folder of a run to resume.
        task: What to run instead of the function of `config.task`.

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
                with distributed_context(config):
                    pl.seed_everything(config.seed, workers=True, verbose=False)
                    return TaskResult((task or _load_task(config.task))(config, resume_dir))
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


def run_task_as_command(
    config: Config, resume_dir: Path | None = None, task: Task | None = None
) -> TaskResult:
    """Call `run_task` for a command: a signal ends training after the current step, saved.

    Library warnings are silenced for the rest of the process.
    """
    silence_libraries()
    with stop_at_step_end(), hide_disk_errors_in_threads():
        return run_task(config, resume_dir, task)


def _load_task(name: str) -> Task:
    module_name, _, function_name = TASKS[name].partition(":")
    function: Task = getattr(import_module(module_name), function_name)
    return function
