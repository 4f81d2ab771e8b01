"""The one exception that means: the user can mend this."""

from __future__ import annotations


class UserError(Exception):
    """One line for the person at the keyboard: what is wrong, what was given, what is accepted, the next step.

    `distill.py` and the `dmt` command print it without a traceback and exit with code 2.
    """


class Refused(UserError):
    """A run that has begun turns out to have nothing to do, so it leaves no folder."""
