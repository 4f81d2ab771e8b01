"""Signals that end a command: one line and an exit code, whatever the command was doing.

SIGHUP comes when a connection drops, SIGUSR1 from Slurm before a time limit; both act like SIGTERM.
Only the command line uses this, and only in the main thread, where handlers can be set. A library
call installs no handler; Ctrl-C in a notebook is the `KeyboardInterrupt` that it always is.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)  # Windows has only two of them
)

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


def set_handlers(handlers: Mapping[int, Any]) -> dict[int, Any]:
    """Set signal handlers and return the previous ones; do nothing outside the main thread.

    Args:
        handlers: By signal; None, a handler that Python did not set, is left out.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {
        signum: signal.signal(signum, handler)
        for signum, handler in handlers.items()
        if handler is not None
    }


def handle_signals(handler: Any) -> dict[int, Any]:
    """Set one handler for `SIGNALS` and return the previous ones.

    A signal that is ignored stays ignored: SIGINT in a shell's background jobs, SIGHUP under nohup.
    """
    active = [signum for signum in SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
    return set_handlers(dict.fromkeys(active, handler))


@contextmanager
def restore_handlers() -> Iterator[None]:
    """Restore the signal handlers at the end of this."""
    handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
    try:
        yield
    finally:
        set_handlers(handlers)


def exit_on_signal() -> None:
    """End the process on a signal without an exception: for the time in which libraries load."""
    handle_signals(_handle_exit)


def _handle_exit(signum: int, _: FrameType | None) -> NoReturn:
    os.write(2, b"stopped while it was starting; nothing had begun, so nothing is lost\n")
    os._exit(128 + signum)


def raise_on_signal() -> None:
    """Raise `KeyboardInterrupt` with the signal's number on a signal."""
    handle_signals(_handle_interrupt)


def _handle_interrupt(signum: int, _: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(signum)


def ignore_signals() -> None:
    """Ignore signals from now on: the work is done and the interpreter shuts down."""
    handle_signals(signal.SIG_IGN)


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
    with suppress(OSError):  # the terminal is gone, as it is after most SIGHUPs
        print(getattr(interruption, "message", default_message), file=sys.stderr, flush=True)
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
