"""How commands print: tables for people or one JSON document for programs, messages to stderr."""

from __future__ import annotations

import codecs
import io
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from dmt.report.summary import Summary

DEFAULT_WIDTH = 160  # columns where the output is not a terminal
MIN_PROGRESS_TOTAL = 100  # a shorter task shows no progress bar


class Output:
    """What a command prints.

    Args:
        as_json: print one JSON document at the end and nothing else on stdout.
        quiet: print no notes and no progress bars.
    """

    def __init__(self, as_json: bool, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.console = Console(
            width=None if sys.stdout.isatty() else DEFAULT_WIDTH,
            highlight=False,
            markup=False,
            soft_wrap=not sys.stdout.isatty(),
        )
        self.stderr_console = Console(stderr=True, highlight=False, markup=False)

    def print_note(self, text: str) -> None:
        """Print a line about progress to stderr."""
        if not self.as_json and not self.quiet:
            self.stderr_console.print(text, style="dim")

    def print_student(self, folder: Path, reason: str = "") -> None:
        """Print on stderr which student a command uses, and why if it was not named."""
        if not self.quiet:
            note = f"student {escape_control_chars(str(folder))}{reason and f' ({reason})'}"
            self.stderr_console.print(note, style="dim", soft_wrap=True)

    def print_line(self, text: str) -> None:
        """Print a line of the result."""
        if not self.as_json:
            self.console.print(escape_control_chars(text))

    def print_text(self, text: str) -> None:
        """Print text as it is, without wrapping it."""
        if not self.as_json:
            print(text)

    def print_table(
        self, columns: Sequence[str], rows: Sequence[Sequence[object]], empty: str
    ) -> None:
        """Print rows under the names of columns; the line `empty` if there are none."""
        if self.as_json:
            return
        if not rows:
            self.console.print(empty)
            return
        table = Table(box=None, pad_edge=False, header_style="bold")
        for index, name in enumerate(columns):
            is_numeric = all(isinstance(row[index], int | float) for row in rows)
            table.add_column(name, justify="right" if is_numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(
                *(
                    Text(f"{cell:,}" if isinstance(cell, int) else escape_control_chars(str(cell)))
                    for cell in row
                )
            )
        self.console.print(table)

    def print_renderable(self, renderable: Any) -> None:
        """Print anything that rich can print."""
        if not self.as_json:
            self.console.print(renderable)

    def print_summary(self, summary: Summary) -> None:
        """Print the results of a run."""
        if self.as_json or os.environ.get("RANK", "0") != "0":
            return
        self.console.print(summary.table.to_rich())
        for line in summary.lines:
            self.print_line(line)

    def print_json(self, payload: Any) -> None:
        """Print the whole result as JSON if `--json` was passed."""
        if self.as_json:
            print(format_json(payload, ascii_only=not _is_utf8(sys.stdout)))

    def print_json_lines(self, items: Iterable[Any]) -> None:
        """Print one JSON document a line, whether `--json` was passed or not."""
        for item in items:
            print(format_json(item, ascii_only=not _is_utf8(sys.stdout), indent=None))

    @contextmanager
    def stdout_to_stderr(self) -> Iterator[None]:
        """Send what libraries print to stderr, if stdout is for one JSON document."""
        with redirect_stdout(sys.stderr) if self.as_json else nullcontext():
            yield

    @contextmanager
    def progress_bar(self, description: str, total: int) -> Iterator[Any]:
        """Show a progress bar on stderr; yield a function that advances it by a count."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(
            *columns,
            console=self.stderr_console,
            disable=self.as_json or self.quiet or total < MIN_PROGRESS_TOTAL,
            transient=True,
        ) as bar:
            task = bar.add_task(description, total=total)
            yield lambda count: bar.advance(task, count)


def format_json(payload: Any, ascii_only: bool = False, indent: int | None = 1) -> str:
    """Format JSON in which every character that a terminal might obey is escaped.

    Args:
        payload: what `json.dumps` accepts.
        ascii_only: escape everything that is not ASCII.
        indent: spaces for each level; None puts everything on one line.
    """
    return "".join(
        char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1]
        for char in json.dumps(payload, ensure_ascii=ascii_only, indent=indent)
    )


def _is_utf8(stream: Any) -> bool:
    encoding = getattr(stream, "encoding", None)
    return encoding is None or codecs.lookup(encoding).name == "utf-8"


@contextmanager
def escape_unencodable_chars() -> Iterator[None]:
    """Escape, within this, characters that stdout and stderr cannot encode, instead of failing."""
    streams = [
        (stream, stream.errors)
        for stream in (sys.stdout, sys.stderr)
        if isinstance(stream, io.TextIOWrapper)
    ]
    for stream, _ in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in streams:
            stream.reconfigure(errors=errors)


@contextmanager
def log_to_stderr(quiet: bool = False, verbose: bool = False) -> Iterator[None]:
    """Print the messages of the logger `dmt` to stderr: warnings if `quiet`, all if `verbose`."""
    logger = logging.getLogger("dmt")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    previous = logger.level, logger.propagate
    logger.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False  # libraries may have configured the root logger too
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = previous


def escape_control_chars(text: str, allowed: str = "") -> str:
    """Escape control characters except `allowed`, so that a terminal shows and does not obey them.

    Tags and texts may come from a pack that somebody else made.
    """
    return "".join(
        char if char.isprintable() or char in allowed else char.encode("unicode_escape").decode()
        for char in text
    )
