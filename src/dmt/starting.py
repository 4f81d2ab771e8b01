"""What a program does before it can do anything: load libraries, which takes longer than all else of a short command."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dmt import stopping


@contextmanager
def libraries() -> Iterator[None]:
    """Import them within this: a signal ends the program on the spot, and Python's collector of garbage rests.

    Nearly all that an import makes stays; to look through it for garbage, again and again as it grows, took a third of the time
    (EXPERIMENTS.md). What was made is left out of later rounds too. Afterwards a signal is a `KeyboardInterrupt`.
    """
    stopping.leave_at_once()
    collects, fresh = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if fresh:  # else objects of whoever uses dmt as a library would be kept
            gc.freeze()
        if collects:
            gc.enable()
    stopping.interrupt()
