"""Ctrl-C and SIGTERM, from the first moment of a program to its last: one line and an exit code, whatever it was doing."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal, and what is to be said about what it ended."""

    def __init__(self, number: int, line: str) -> None:
        super().__init__(number)
        self.line = line


def number_of(stopped: BaseException | None) -> int:
    """The signal behind an interrupt: what its handler put into it, else Ctrl-C."""
    return next(iter(getattr(stopped, "args", ())), signal.SIGINT)


def leave_at_once() -> None:
    """While libraries load, a signal ends the program on the spot: imports are no place for an exception to come from."""
    for number in NUMBERS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as of a shell's background jobs
            signal.signal(number, _leave)


def _leave(number: int, _: FrameType | None) -> NoReturn:
    os.write(2, b"stopped while it was starting; nothing had begun, so nothing is lost\n")
    os._exit(128 + number)


def interrupt() -> None:
    """From now on a signal is a `KeyboardInterrupt` with its number."""
    for number, handler in zip(NUMBERS, (signal.default_int_handler, _interrupt), strict=True):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _interrupt(number: int, _: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(number)


def leave_be() -> None:
    """All is done and said: a signal that comes while the interpreter takes itself apart changes nothing."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def told(stopped: KeyboardInterrupt, line: str) -> int:
    """Say what a signal ended, in its own words or by `line`; the exit code."""
    print(getattr(stopped, "line", line), file=sys.stderr)
    return 128 + number_of(stopped)
