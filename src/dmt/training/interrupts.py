"""Runs that end early, by a signal, non-finite numbers or the disk: one line with a remedy."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dmt import files
from dmt.config import Config
from dmt.errors import FailureError, UserError
from dmt.signals import SignalInterrupt, get_signal_number, set_handlers
from dmt.training.callbacks import StopOnSignal
from dmt.training.optimization import NonFiniteError
from dmt.training.run_dir import (
    current_run,
    current_run_getter,
    list_checkpoints,
    newest_checkpoint,
    resume_command,
)


class RunInterrupted(SignalInterrupt):
    """A signal or Ctrl-C ended a run; the message says how to resume it.

    Attributes:
        run_dir: Folder of the run.
    """

    def __init__(self, signum: int, run_dir: Path) -> None:
        newest = newest_checkpoint(run_dir)
        state = (
            "before the first checkpoint; begin again with"
            if newest is None
            else f"after step {newest.stem[5:]}; resume with"
        )
        super().__init__(signum, f"stopped {state}: {resume_command(run_dir)}")
        self.run_dir = run_dir


@contextmanager
def report_interruption(
    config: Config, run_dir: Path, stop_callback: StopOnSignal
) -> Iterator[None]:
    """Turn an early end of Lightning's `fit` into `RunInterrupted` or a `UserError`."""
    handler_before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as system_exit:  # Lightning's answer to a KeyboardInterrupt
        set_handlers({signal.SIGINT: handler_before})  # Lightning leaves the signal ignored
        raise RunInterrupted(
            stop_callback.received_signal or get_signal_number(system_exit.__context__), run_dir
        ) from None
    except NonFiniteError as error:
        raise UserError(_format_divergence(config, run_dir, error)) from None


def _format_divergence(config: Config, run_dir: Path, error: NonFiniteError) -> str:
    setting, rate = _get_learning_rate(config, error.step)
    for checkpoint in list_checkpoints(run_dir):
        assert int(checkpoint.stem[5:]) < error.step, (
            f"{checkpoint} is from a step with numbers that are not finite"
        )
    newest = newest_checkpoint(run_dir)
    restart_advice = (
        "there is no checkpoint yet, begin again"
        if newest is None
        else f"the last good checkpoint is {newest.name}, resume from it"
    )
    return (
        f"{error}; nothing of this step was kept; {restart_advice} with a lower rate:"
        f" {resume_command(run_dir)} {setting}={rate / 4:g}"
    )


def _get_learning_rate(config: Config, step: int) -> tuple[str, float]:
    """Return the setting of the learning rate of a step, counted from 1, and its value."""
    if config.task == "sleep":
        return "sleep.lr", config.sleep.lr
    if config.task == "distill" and step <= config.stages.layerwise_steps:
        return "stages.layerwise_lr", config.stages.layerwise_lr
    return "stages.end_to_end_lr", config.stages.end_to_end_lr


@contextmanager
def report_disk_errors(log_dir: str) -> Iterator[None]:
    """Turn disk errors into one line about the current run.

    Args:
        log_dir: What the message names if there is no run yet.

    Raises:
        FailureError: The disk failed, or the folder of the run was removed.
        UserError: A file may not be opened.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        run_dir = current_run()
        if _is_run_deleted(error, run_dir):
            raise FailureError(
                f"{run_dir}: the folder was removed while the run wrote to it ({error});"
                " begin again"
            ) from None
        if (problem_and_advice := files.disk_error(error)) is None:
            raise
        problem, advice = problem_and_advice
        next_step = (
            "then begin again"
            if run_dir is None
            else f"then resume with: {resume_command(run_dir)}"
        )
        error_class = files.disk_error_class(error, run_dir or Path(log_dir))
        raise error_class(f"{run_dir or log_dir}: {problem}; {advice}, {next_step}") from None


@contextmanager
def hide_disk_errors_in_threads() -> Iterator[None]:
    """Print no traceback for a disk error in a thread; for commands only.

    TensorBoard writes in a thread of its own. The run's thread waits for it and reports the error.
    """
    previous_hook = threading.excepthook
    get_current_run = current_run_getter()

    def hide_disk_errors(hook_args: Any) -> None:
        error = hook_args.exc_value
        if error is None or (
            files.disk_error(error) is None and not _is_run_deleted(error, get_current_run())
        ):
            previous_hook(hook_args)

    threading.excepthook = hide_disk_errors
    try:
        yield
    finally:
        threading.excepthook = previous_hook


def _is_run_deleted(error: BaseException, run_dir: Path | None) -> bool:
    """Return whether the run's folder is missing, or was when `error` occurred.

    The next checkpoint creates the folder again, so it may exist by now.
    """
    if run_dir is None:
        return False
    missing_path = error.filename if isinstance(error, FileNotFoundError) else None
    if isinstance(missing_path, str | Path) and Path(missing_path).absolute().is_relative_to(
        run_dir.absolute()
    ):
        return True
    return not run_dir.exists()
