"""How a run ends that does not reach its end: by a signal, a number that is not finite or a disk; each in one line that says
how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dmt import disk
from dmt.config import Config
from dmt.distill.callbacks import StopOnSignal
from dmt.distill.finite import NotFinite
from dmt.distill.folder import checkpoints, how_to_go_on, newest_checkpoint, run_in_hand
from dmt.errors import UserError
from dmt.stopping import number_of


class Interrupted(Exception):
    """A signal ended the run; its last checkpoint is there to go on from, or it is begun again."""

    def __init__(self, number: int, run: Path) -> None:
        super().__init__(f"stopped {_where(run)}: {how_to_go_on(run)}")
        self.number = number


def _where(run: Path) -> str:
    saved = newest_checkpoint(run)
    return "before the first checkpoint; begin again with" if saved is None else f"after step {saved.stem[5:]}; go on with"


@contextmanager
def told_at_its_end(config: Config, run: Path, stop: StopOnSignal) -> Iterator[None]:
    """Turn what ends training early into `Interrupted` or a `UserError`."""
    try:
        yield
    except SystemExit as ended:  # Lightning's answer to a KeyboardInterrupt: a second signal, or one before the first step
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which it leaves ignored
        raise Interrupted(stop.received or number_of(ended.__context__), run) from None
    except NotFinite as met:
        raise UserError(_diverged(config, run, met)) from None


def _diverged(config: Config, run: Path, met: NotFinite) -> str:
    setting, rate = _rate(config, met.step)
    for later in checkpoints(run):
        assert int(later.stem[5:]) < met.step, f"{later} is from a step with numbers that are not finite"
    saved = newest_checkpoint(run)
    kept = (
        "there is no checkpoint yet, begin again" if saved is None else f"the last good checkpoint is {saved.name}, go on from it"
    )
    return f"{met}; nothing of this step was kept; {kept} with a lower rate: {how_to_go_on(run)} {setting}={rate / 4:g}"


def _rate(config: Config, step: int) -> tuple[str, float]:
    """The setting by which the learning rate of a step, counted from 1, was set, and what it is."""
    if config.task == "pretrain":
        return "pretrain.lr", config.pretrain.lr
    if config.task == "distill" and step <= config.stages.layerwise_steps:
        return "stages.layerwise_lr", config.stages.layerwise_lr
    return "stages.end_to_end_lr", config.stages.end_to_end_lr


@contextmanager
def told_of_disks(logs: str) -> Iterator[None]:
    """Turn what a disk complains about into one line about the run in hand, or of one that could not begin about `logs`."""
    before = threading.excepthook

    def quietly(failed: Any) -> None:  # TensorBoard's writer has a thread; who waits for it is told the same
        if failed.exc_value is None or (disk.trouble(failed.exc_value) is None and not _taken_away(failed.exc_value)):
            before(failed)

    threading.excepthook = quietly
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        run = run_in_hand()
        if _taken_away(error):
            raise UserError(f"{run}: somebody took this folder away while the run wrote to it ({error}); begin again") from None
        if (found := disk.trouble(error)) is None:
            raise
        what, helps = found
        then = "then begin again" if run is None else f"then go on with: {how_to_go_on(run)}"
        raise UserError(f"{run or logs}: {what}; {helps}, {then}") from None
    finally:
        threading.excepthook = before


def _taken_away(error: BaseException) -> bool:
    """Whether the folder of the run in hand is no longer there, or was not when `error` met it: a checkpoint makes it anew."""
    if (run := run_in_hand()) is None:
        return False
    missing = error.filename if isinstance(error, FileNotFoundError) else None
    if isinstance(missing, str | Path) and Path(missing).absolute().is_relative_to(run.absolute()):
        return True
    return not run.exists()
