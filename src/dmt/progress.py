"""Dated lines in the log for work that takes minutes: how far it is and how long it still takes."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger(__name__)

LOG_INTERVAL = 30.0  # seconds between two lines


class ProgressLog:
    """Log a dated line at most every `LOG_INTERVAL` seconds.

    Args:
        label: what is counted, as it stands before the numbers, such as `step`.
        total: units of all work.
        unit: what stands behind the numbers.
        start: units that were done before.
    """

    def __init__(self, label: str, total: int, unit: str = "", start: int = 0) -> None:
        self.label, self.total, self.unit, self.start = label, total, unit, start
        self._start_time = self._last_time = time.monotonic()

    def is_due(self) -> bool:
        """Return whether the last line is old enough for another one."""
        return time.monotonic() - self._last_time >= LOG_INTERVAL

    def update(self, done: int, details: str = "") -> None:
        """Log a line if one is due.

        Args:
            done: units that are done.
            details: more text for the line.
        """
        if not self.is_due():
            return
        self._last_time = now = time.monotonic()
        seconds_per_unit = (now - self._start_time) / max(1, done - self.start)
        logger.info(
            "%s  %s %s/%s%s%s, %s left",
            time.strftime("%Y-%m-%d %H:%M:%S"),
            self.label,
            f"{done:,}",
            f"{self.total:,}",
            self.unit,
            details,
            humanize_duration(seconds_per_unit * (self.total - done)),
        )


def humanize_duration(seconds: float) -> str:
    """Format a length of time to a digit or two, as in `about 3 minutes`."""
    if seconds < 55:
        return f"about {max(5, 5 * round(seconds / 5))} seconds"
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} minute{'s' if seconds >= 90 else ''}"
    return f"about {seconds / 3600:.1f} hours"
