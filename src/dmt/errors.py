"""Exceptions that mean: the caller can fix this."""

from __future__ import annotations

from typing import Any

MAX_SHOWN_CHARS = 100  # characters of a value that an error message shows


class UserError(ValueError):
    """An argument, a setting or a file is wrong, and the message says how to fix it.

    The message is one line: what is wrong, the value, what is accepted, the next step. Library
    functions raise it as any ValueError; the command line prints it without a traceback and exits
    with code 2.
    """


class FailureError(UserError):
    """Something failed although the arguments are right, such as a full disk.

    The command line exits with code 1.
    """


class UnknownSettingError(UserError):
    """A key names no setting."""


class WrongModelError(UserError):
    """A file of rows or facts belongs to another model, or is not a file of rows or facts."""


class NothingToDoError(UserError):
    """A run has nothing to do; it leaves no folder."""


def format_value(value: Any) -> str:
    """Format `value` on one line as a person would type it, shortened where it is long.

    None becomes `nothing`.
    """
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        text = f"[{', '.join(map(format_value, value))}]"
    elif isinstance(value, dict):
        items = (f"{format_value(key)}: {format_value(item)}" for key, item in value.items())
        text = f"{{{', '.join(items)}}}"
    elif isinstance(value, int) and abs(value) >= 10**MAX_SHOWN_CHARS:
        text = "a number of more than 100 digits"  # Python refuses to print very long ones
    else:
        text = str(value) if str(value).strip() and str(value).isprintable() else repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + " ..."
