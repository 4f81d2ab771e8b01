"""One self-contained HTML file: its contents as data, and the rendering. No script, no network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmt import files
from dmt.report.svg import Plot
from dmt.report.tables import Table

TEMPLATE_DIR = Path(__file__).parent


@dataclass(frozen=True)
class Card:
    """A figure at the top of the page: the number, its name and an explanation."""

    value: str
    label: str
    meaning: str = ""


@dataclass(frozen=True)
class Sample:
    """A prompt and its continuations.

    Attributes:
        corpus: where the prompt comes from.
        prompt: the prompt.
        continuations: for each model its name and its text in spans, each with whether only this
            model generates it.
        caption: a sentence below.
    """

    corpus: str
    prompt: str
    continuations: list[tuple[str, list[tuple[str, bool]]]]
    caption: str


@dataclass
class Page:
    """The contents of a page; empty parts are left out."""

    title: str
    summary: str
    kind: str
    cards: list[Card] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    context: str = ""
    notes: list[str] = field(default_factory=list)
    locations: list[tuple[str, str]] = field(default_factory=list)
    provenance: str = ""


def render_html(page: Page) -> str:
    """Return the HTML file; all text is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATE_DIR),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style: Any = (TEMPLATE_DIR / "page.css").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(page=page, style=style)


def write_page(page: Page, path: Path) -> None:
    """Render a page and write it atomically."""
    # Text may hold what UTF-8 cannot encode, such as half a surrogate pair: it becomes `?`.
    files.atomic_write(path, render_html(page).encode("utf-8", errors="replace").decode("utf-8"))


def write_report_safely(build_page: Callable[[], Page], path: Path) -> str:
    """Build a page and write it; return its path, or why there is none.

    An error is reported and not raised: the results of a run do not depend on its page.
    """
    try:
        write_page(build_page(), path)
    except Exception as error:  # of any kind: everything else of the run is still written
        return f"no {path.name} ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return str(path)
