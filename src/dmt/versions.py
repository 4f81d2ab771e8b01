"""Versions of the files that dmt writes: of one that is older or newer than it knows, what is told and what is to be done.

The README lists all of them ("Versions of files").
"""

from __future__ import annotations

from typing import Any

from dmt.errors import UserError
from dmt.wording import shown

CONFIG = 1
"""Of a run's `config.yaml`, in its first line; a file without one is of version 1."""
RECORD = 1
"""Of `run.json`, under `format`, and of the files for people beside it."""
CHECKPOINT = 1
"""Of a checkpoint, under `dmt`; one without is of version 1."""
STUDENT = 1
"""Of a saved student, in its `config.json` under `dmt`; one without is of version 1."""


def check_version(found: Any, known: int, what: str, older: str) -> None:
    """Let the version `known` pass, as a number or its digits.

    Args:
        what: begins the line, as in `pack family: version`.
        older: what to do with a file of an older version, or of none.

    Raises:
        UserError: it is another.
    """
    number = int(found) if isinstance(found, str) and found.isdecimal() and len(found) < 10 else found
    if type(number) is int and number == known:
        return
    newer = type(number) is int and number > known
    advice = "a newer dmt made it: update dmt, or use the one that made it" if newer else older
    raise UserError(f"{what} {shown(found)}, this dmt knows {known}; {advice}")
