"""What a program does before it can do anything: load libraries, which takes longer than all else of a short command.

Ctrl-C and SIGTERM, from the first moment of a program to its last: one line and an exit code, whatever it was doing.
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


class SignalInterrupt(KeyboardInterrupt):
    """A signal, and what is to be said about what it ended."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(signum)
        self.message = message


def get_signal_number(interruption: BaseException | None) -> int:
    """The signal behind an interrupt: what its handler put into it, else Ctrl-C."""
    return next(iter(getattr(interruption, "args", ())), signal.SIGINT)


def exit_on_signal() -> None:
    """While libraries load, a signal ends the program on the spot: imports are no place for an exception to come from."""
    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as of a shell's background jobs
            signal.signal(signum, _handle_exit)


def _handle_exit(signum: int, _: FrameType | None) -> NoReturn:
    os.write(2, b"stopped while it was starting; nothing had begun, so nothing is lost\n")
    os._exit(128 + signum)


def raise_on_signal() -> None:
    """From now on a signal is a `KeyboardInterrupt` with its number."""
    for signum, handler in zip(
        SIGNALS, (signal.default_int_handler, _handle_interrupt), strict=True
    ):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, handler)


def _handle_interrupt(signum: int, _: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(signum)


def ignore_signals() -> None:
    """All is done and said: a signal that comes while the interpreter takes itself apart changes nothing."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def report_signal(interruption: KeyboardInterrupt, default_message: str) -> int:
    """Say what a signal ended, in its own words or by `line`; the exit code."""
    print(getattr(interruption, "message", default_message), file=sys.stderr)
    return 128 + get_signal_number(interruption)


@contextmanager
def fast_imports() -> Iterator[None]:
    """Import them within this: a signal ends the program on the spot, and Python's collector of garbage rests.

    Nearly all that an import makes stays; to look through it for garbage, again and again as it grows, took a third of the time
    (EXPERIMENTS.md). What was made is left out of later rounds too. Afterwards a signal is a `KeyboardInterrupt`.
    """
    exit_on_signal()
    gc_was_enabled, is_first_import = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if is_first_import:  # else objects of whoever uses dmt as a library would be kept
            gc.freeze()
        if gc_was_enabled:
            gc.enable()
    raise_on_signal()
