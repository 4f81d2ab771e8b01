"""One self-contained HTML file: what stands in it, as data, and the data as HTML. No script, no network, light and dark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmt import disk
from dmt.pages.maps import UsageMap
from dmt.pages.plots import Plot

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Card:
    """A figure that a person should see first: the number, what it is, and what it means."""

    number: str
    what: str
    meaning: str = ""


@dataclass(frozen=True)
class Row:
    """A line of a table: what is measured, what that means, and a cell a column; `differs` sets it apart."""

    what: str
    meaning: str
    cells: tuple[str, ...]
    differs: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under the names of columns; the first column's is the table's own."""

    title: str
    columns: tuple[str, ...]
    rows: list[Row]
    words: str = ""


@dataclass(frozen=True)
class Sample:
    """A prompt and how each of several goes on: its name and pieces of text, each with whether it is its own alone."""

    where: str
    prompt: str
    said: list[tuple[str, list[tuple[str, bool]]]]
    words: str


@dataclass
class Page:
    """All that a page says; parts that are empty are left out."""

    title: str
    lead: str
    kind: str
    cards: list[Card] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    maps: list[UsageMap] = field(default_factory=list)
    maps_words: str = ""
    samples: list[Sample] = field(default_factory=list)
    text: str = ""
    notes: list[str] = field(default_factory=list)
    places: list[tuple[str, str]] = field(default_factory=list)
    made: str = ""


def html(page: Page) -> str:
    """The whole file. Text of whatever origin is escaped; pictures are ours."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    room = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style: Any = (HERE / "page.css").read_text(encoding="utf-8")
    return room.get_template("page.html").render(page=page, style=style)


def write(page: Page, file: Path) -> None:
    """`html` into `file`: whole or not at all."""
    # What no UTF-8 can hold, half a character say, came from a text and is shown as a question mark.
    disk.write(file, html(page).encode("utf-8", errors="replace").decode("utf-8"))


def leave(make: Callable[[], Page], file: Path) -> str:
    """Make a page and write it: its place, or why there is none. A run's results do not depend on a picture of them."""
    try:
        write(make(), file)
    except Exception as error:  # whatever it is: everything else of the run is written, and stays
        return f"no {file.name} ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return str(file)
