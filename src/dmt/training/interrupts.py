"""How a run ends that does not reach its end: by a signal, a number that is not finite or a disk; each in one line that says
how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dmt import files
from dmt.config import Config
from dmt.errors import UserError
from dmt.signals import get_signal_number
from dmt.training.callbacks import StopOnSignal
from dmt.training.checkpoints import NonFiniteError
from dmt.training.run_dir import current_run, list_checkpoints, newest_checkpoint, resume_command


class RunInterrupted(Exception):
    """A signal ended the run; its last checkpoint is there to go on from, or it is begun again."""

    def __init__(self, signum: int, run_dir: Path) -> None:
        super().__init__(f"stopped {_describe_last_checkpoint(run_dir)}: {resume_command(run_dir)}")
        self.signum = signum


def _describe_last_checkpoint(run_dir: Path) -> str:
    newest = newest_checkpoint(run_dir)
    return (
        "before the first checkpoint; begin again with"
        if newest is None
        else f"after step {newest.stem[5:]}; go on with"
    )


@contextmanager
def report_interruption(
    config: Config, run_dir: Path, stop_callback: StopOnSignal
) -> Iterator[None]:
    """Turn what ends training early into `Interrupted` or a `UserError`."""
    try:
        yield
    except SystemExit as system_exit:  # Lightning's answer to a KeyboardInterrupt: a second signal, or one before the first step
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which it leaves ignored
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
        else f"the last good checkpoint is {newest.name}, go on from it"
    )
    return f"{error}; nothing of this step was kept; {restart_advice} with a lower rate: {resume_command(run_dir)} {setting}={rate / 4:g}"


def _get_learning_rate(config: Config, step: int) -> tuple[str, float]:
    """The setting by which the learning rate of a step, counted from 1, was set, and what it is."""
    if config.task == "pretrain":
        return "pretrain.lr", config.pretrain.lr
    if config.task == "distill" and step <= config.stages.layerwise_steps:
        return "stages.layerwise_lr", config.stages.layerwise_lr
    return "stages.end_to_end_lr", config.stages.end_to_end_lr


@contextmanager
def report_disk_errors(log_dir: str) -> Iterator[None]:
    """Turn what a disk complains about into one line about the run in hand, or of one that could not begin about `logs`."""
    previous_hook = threading.excepthook

    def hide_disk_errors(
        hook_args: Any,
    ) -> None:  # TensorBoard's writer has a thread; who waits for it is told the same
        if hook_args.exc_value is None or (
            files.disk_error(hook_args.exc_value) is None
            and not _is_run_deleted(hook_args.exc_value)
        ):
            previous_hook(hook_args)

    threading.excepthook = hide_disk_errors
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        run_dir = current_run()
        if _is_run_deleted(error):
            raise UserError(
                f"{run_dir}: somebody took this folder away while the run wrote to it ({error}); begin again"
            ) from None
        if (problem_and_advice := files.disk_error(error)) is None:
            raise
        problem, advice = problem_and_advice
        next_step = (
            "then begin again" if run_dir is None else f"then go on with: {resume_command(run_dir)}"
        )
        raise UserError(f"{run_dir or log_dir}: {problem}; {advice}, {next_step}") from None
    finally:
        threading.excepthook = previous_hook


def _is_run_deleted(error: BaseException) -> bool:
    """Whether the folder of the run in hand is no longer there, or was not when `error` met it: a checkpoint makes it anew."""
    if (run_dir := current_run()) is None:
        return False
    missing_path = error.filename if isinstance(error, FileNotFoundError) else None
    if isinstance(missing_path, str | Path) and Path(missing_path).absolute().is_relative_to(
        run_dir.absolute()
    ):
        return True
    return not run_dir.exists()
