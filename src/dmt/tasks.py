"""Run what a config asks for: distill, consolidate or sleep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmt.config import Config
from dmt.consolidation.run import run_consolidation
from dmt.consolidation.sleep import run_slot_transfer
from dmt.distillation.run import run_distillation
from dmt.signals import stop_at_step_end
from dmt.training.execution import execute
from dmt.training.interrupts import hide_disk_errors_in_threads
from dmt.training.run_dir import read_record
from dmt.training.trainer import silence_libraries

TASKS = {
    "distill": run_distillation,
    "consolidate": run_consolidation,
    "sleep": run_slot_transfer,
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


def run_task(config: Config, resume_dir: Path | None = None) -> TaskResult:
    """Do what `config.task` says; see `dmt.training.execution.execute`."""
    return TaskResult(execute(TASKS[config.task], config, resume_dir))


def run_task_as_command(config: Config, resume_dir: Path | None = None) -> TaskResult:
    """Call `run_task` for a command: a signal ends training after the current step, saved.

    Library warnings are silenced for the rest of the process.
    """
    silence_libraries()
    with stop_at_step_end(), hide_disk_errors_in_threads():
        return run_task(config, resume_dir)
