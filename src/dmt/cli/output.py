"""How commands answer: tables for people, one JSON document for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dmt.errors import UserError, format_value

DEFAULT_WIDTH = 160
"""Columns of text where it does not go to a terminal."""


class Output:
    """Where commands print to.

    Args:
        as_json: one JSON document at the end, on standard output, and nothing else there.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.console = Console(
            width=None if sys.stdout.isatty() else DEFAULT_WIDTH,
            highlight=False,
            markup=False,
            soft_wrap=not sys.stdout.isatty(),
        )
        self.stderr_console = Console(stderr=True, highlight=False, markup=False)

    def print_note(self, text: str) -> None:
        """A line about what is going on; for people only."""
        if not self.as_json:
            self.stderr_console.print(text, style="dim")

    def print_line(self, text: str) -> None:
        """A line of the answer."""
        if not self.as_json:
            self.console.print(escape_control_chars(text))

    def print_table(
        self, columns: Sequence[str], rows: Sequence[Sequence[object]], empty: str
    ) -> None:
        """Rows under the names of columns; the line `empty` where there are none."""
        if self.as_json:
            return
        if not rows:
            self.console.print(empty)
            return
        rendered = Table(box=None, pad_edge=False, header_style="bold")
        for index, name in enumerate(columns):
            is_numeric = all(isinstance(row[index], int | float) for row in rows)
            rendered.add_column(name, justify="right" if is_numeric else "left", overflow="fold")
        for row in rows:
            rendered.add_row(
                *(
                    Text(f"{cell:,}" if isinstance(cell, int) else escape_control_chars(str(cell)))
                    for cell in row
                )
            )
        self.console.print(rendered)

    def print_renderable(self, renderable: Any) -> None:
        """Something that rich can print."""
        if not self.as_json:
            self.console.print(renderable)

    def print_json(self, payload: Any) -> None:
        """The whole answer, for programs."""
        if self.as_json:
            json.dump(payload, sys.stdout, ensure_ascii=False, indent=1)
            print()

    @contextmanager
    def stdout_to_stderr(self) -> Iterator[None]:
        """What others print goes to standard error, where standard output is for one document."""
        with redirect_stdout(sys.stderr) if self.as_json else nullcontext():
            yield

    @contextmanager
    def progress_bar(self, description: str, total: int) -> Iterator[Any]:
        """A bar, on standard error, for work that takes a while; gives what tells it of progress."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(
            *columns,
            console=self.stderr_console,
            disable=self.as_json or total < 100,
            transient=True,
        ) as bar:
            task = bar.add_task(description, total=total)
            yield lambda count: bar.advance(task, count)


def check_seed(seed: int) -> None:
    """Raise `UserError` for a `--seed` that no generator of random numbers takes."""
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed must be in [0, {2**32 - 1}], got {format_value(seed)}")


def escape_control_chars(text: str, allowed: str = "") -> str:
    """Text whose control characters, but for those in `keep`, are seen and not obeyed: a tag may come from anywhere."""
    return "".join(
        char if char.isprintable() or char in allowed else char.encode("unicode_escape").decode()
        for char in text
    )


def format_time(seconds: float) -> str:
    """A moment as people write it; empty for never."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else ""
