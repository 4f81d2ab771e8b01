"""SIGINT and SIGTERM of a command: one line and an exit code, whatever the command was doing.

Only the command line uses this. A library call installs no handler; Ctrl-C in a notebook is the
`KeyboardInterrupt` that it always is.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_stops_at_step_end = False


class SignalInterrupt(KeyboardInterrupt):
    """An interrupt with a message about the work that it ended.

    Args:
        signum: Number of the signal.
        message: One line for the user.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(signum)
        self.signum, self.message = signum, message

    def __str__(self) -> str:
        return self.message


def get_signal_number(interruption: BaseException | None) -> int:
    """Return the signal behind an interrupt: what its handler put into it, else SIGINT."""
    return next(iter(getattr(interruption, "args", ())), signal.SIGINT)


def exit_on_signal() -> None:
    """End the process on a signal without an exception: for the time in which libraries load."""
    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as in a shell's background jobs
            signal.signal(signum, _handle_exit)


def _handle_exit(signum: int, _: FrameType | None) -> NoReturn:
    os.write(2, b"stopped while it was starting; nothing had begun, so nothing is lost\n")
    os._exit(128 + signum)


def raise_on_signal() -> None:
    """Raise `KeyboardInterrupt` with the signal's number on a signal."""
    for signum, handler in zip(
        SIGNALS, (signal.default_int_handler, _handle_interrupt), strict=True
    ):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, handler)


def _handle_interrupt(signum: int, _: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(signum)


def ignore_signals() -> None:
    """Ignore signals from now on: the work is done and the interpreter shuts down."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


@contextmanager
def stop_at_step_end() -> Iterator[None]:
    """Let a signal end a training run after the current step, with a checkpoint, within this."""
    global _stops_at_step_end
    before, _stops_at_step_end = _stops_at_step_end, True
    try:
        yield
    finally:
        _stops_at_step_end = before


def stops_at_step_end() -> bool:
    """Return whether a training run may install signal handlers, see `stop_at_step_end`."""
    return _stops_at_step_end


def report_signal(interruption: KeyboardInterrupt, default_message: str) -> int:
    """Print what a signal ended, by the interrupt's own message if it has one; the exit code."""
    print(getattr(interruption, "message", default_message), file=sys.stderr)
    return 128 + get_signal_number(interruption)


@contextmanager
def fast_imports() -> Iterator[None]:
    """Import libraries within this: a signal ends the process, and garbage collection rests.

    Nearly all that an import allocates stays, so searching it for garbage took a third of the time
    (docs/experiments). Afterwards a signal is a `KeyboardInterrupt`.
    """
    exit_on_signal()
    gc_was_enabled, is_first_import = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if is_first_import:  # otherwise objects of the caller would be frozen too
            gc.freeze()
        if gc_was_enabled:
            gc.enable()
    raise_on_signal()
