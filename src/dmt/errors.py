"""The one exception that means: the user can mend this."""

from __future__ import annotations

from typing import Any

MAX_SHOWN_CHARS = 100
"""Characters of a given value that are shown."""


class UserError(Exception):
    """One line for the person at the keyboard: what is wrong, what was given, what is accepted, the next step.

    `distill.py` and the `dmt` command print it without a traceback and exit with code 2.
    """


class NothingToDoError(UserError):
    """A run that has begun turns out to have nothing to do, so it leaves no folder."""


def format_value(value: Any) -> str:
    """`value` on one line as a person would type it; `nothing` for None, cut short where it is long."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        text = f"[{', '.join(map(format_value, value))}]"
    elif isinstance(value, dict):
        text = f"{{{', '.join(f'{format_value(key)}: {format_value(item)}' for key, item in value.items())}}}"
    elif isinstance(value, int) and abs(value) >= 10**MAX_SHOWN_CHARS:
        text = "a number of more than 100 digits"  # Python refuses to write out very long ones
    else:
        text = str(value) if str(value).strip() and str(value).isprintable() else repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + " ..."
