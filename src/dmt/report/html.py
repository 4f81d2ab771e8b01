"""One self-contained HTML file: what stands in it, as data, and the data as HTML. No script, no network, light and dark.

How often each slot is read, as a picture with one cell a slot, layer by layer.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from math import sqrt
from pathlib import Path
from typing import Any

from dmt import files
from dmt.report.svg import Plot

READ_COLOR, UNREAD_COLOR = (214, 120, 20), (116, 98, 214)
"""Red, green, blue of what is read, the more opaque the more often, and of what is never; both are seen on black and white."""
MIN_OPACITY = 26
"""Opacity, of 255, of a cell that is read hardly ever."""
PICTURE_WIDTHS = ((1_024, 32), (2_048, 64), (float("inf"), 96))
"""Up to how many cells a picture is how wide."""
NUM_BUSIEST = 3
"""Slots that are named under a picture."""


@dataclass(frozen=True)
class UsageMap:
    """The picture of one layer.

    Attributes:
        layer: its number.
        picture: a PNG of one pixel a cell, as a `data:` URI.
        across, down: its size in cells.
        bands: a line about each row of cells, for a pointer that rests on it.
        words: what the picture says, in words.
    """

    layer: int
    picture: str
    width: int
    height: int
    bands: list[str]
    caption: str


def draw_usage_maps(slots: Mapping[str, Mapping[str, Any]]) -> list[UsageMap]:
    """A map for each layer whose slots were counted, all with one scale; from `slots` in a run's record."""
    counted = {layer: usage for layer, usage in slots.items() if usage.get("reads")}
    max_reads = max(
        (max(usage["reads"]) / usage["reads_of"] for usage in counted.values()), default=0
    )
    return [
        _draw_usage_map(int(layer), usage, max(1.0, max_reads)) for layer, usage in counted.items()
    ]


def _draw_usage_map(layer: int, usage: Mapping[str, Any], max_reads: float) -> UsageMap:
    reads, slots_per_cell, tokens = usage["reads"], int(usage["reads_of"]), max(1, usage["tokens"])
    width = next(candidate for max_cells, candidate in PICTURE_WIDTHS if len(reads) <= max_cells)
    height = -(-len(reads) // width)
    bands = []
    for row in range(height):
        cells = reads[row * width : (row + 1) * width]
        busiest_cell = max(range(len(cells)), key=cells.__getitem__)
        first_slot = row * width * slots_per_cell
        band = f"slots {first_slot:,} to {min(first_slot + len(cells) * slots_per_cell, int(usage['slots'])) - 1:,}: {sum(cells):,} reads"
        bands.append(
            f"{band}, most by {_format_slots(row * width + busiest_cell, slots_per_cell)} ({_format_reads(cells[busiest_cell], tokens * slots_per_cell)} of tokens)"
        )
    busiest = sorted(range(len(reads)), key=lambda cell: -reads[cell])[:NUM_BUSIEST]
    busiest_text = ", ".join(
        f"{_format_slots(cell, slots_per_cell)} for {_format_reads(reads[cell], tokens * slots_per_cell)}"
        for cell in busiest
    )
    caption = f"{usage['read']:.1f} of {usage['slots']:,} slots are read for a token, {usage['dead']:,.0f} never; most often {busiest_text}"
    return UsageMap(
        layer,
        _encode_png(reads, slots_per_cell, max_reads, width, height),
        width,
        height,
        bands,
        caption,
    )


def _format_slots(cell: int, slots_per_cell: int) -> str:
    return (
        f"slot {cell}"
        if slots_per_cell == 1
        else f"the {slots_per_cell} slots from {cell * slots_per_cell:,} on"
    )


def _format_reads(reads: int, tokens: int) -> str:
    return f"{reads / tokens:.1%}".replace("%", " %")


def _encode_png(
    reads: Sequence[int], slots_per_cell: int, max_reads: float, width: int, height: int
) -> str:
    from PIL import Image  # comes with TensorBoard; only where something is drawn

    pixels = []
    for num_reads in reads:
        # Of what is read seldom there is so much that a share itself would show nothing else, hence its root.
        strength = sqrt(num_reads / slots_per_cell / max_reads)
        pixels.append(
            (*READ_COLOR, MIN_OPACITY + round(strength * (255 - MIN_OPACITY)))
            if num_reads
            else (*UNREAD_COLOR, 255)
        )
    image = Image.new("RGBA", (width, height))
    image.putdata(pixels + [(0, 0, 0, 0)] * (width * height - len(pixels)))
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + b64encode(buffer.getvalue()).decode()


TEMPLATE_DIR = Path(__file__).parent


@dataclass(frozen=True)
class Card:
    """A figure that a person should see first: the number, what it is, and what it means."""

    value: str
    label: str
    meaning: str = ""


@dataclass(frozen=True)
class HtmlRow:
    """A line of a table: what is measured, what that means, and a cell a column; `differs` sets it apart."""

    label: str
    meaning: str
    cells: tuple[str, ...]
    is_different: bool = False


@dataclass(frozen=True)
class HtmlTable:
    """Rows under the names of columns; the first column's is the table's own."""

    title: str
    columns: tuple[str, ...]
    rows: list[HtmlRow]
    caption: str = ""


@dataclass(frozen=True)
class Sample:
    """A prompt and how each of several goes on: its name and pieces of text, each with whether it is its own alone."""

    corpus: str
    prompt: str
    continuations: list[tuple[str, list[tuple[str, bool]]]]
    caption: str


@dataclass
class Page:
    """All that a page says; parts that are empty are left out."""

    title: str
    summary: str
    kind: str
    cards: list[Card] = field(default_factory=list)
    tables: list[HtmlTable] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    usage_maps: list[UsageMap] = field(default_factory=list)
    usage_caption: str = ""
    samples: list[Sample] = field(default_factory=list)
    context: str = ""
    notes: list[str] = field(default_factory=list)
    locations: list[tuple[str, str]] = field(default_factory=list)
    provenance: str = ""


def render_html(page: Page) -> str:
    """The whole file. Text of whatever origin is escaped; pictures are ours."""
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
    """`html` into `file`: whole or not at all."""
    # What no UTF-8 can hold, half a character say, came from a text and is shown as a question mark.
    files.atomic_write(path, render_html(page).encode("utf-8", errors="replace").decode("utf-8"))


def write_report_safely(build_page: Callable[[], Page], path: Path) -> str:
    """Make a page and write it: its place, or why there is none. A run's results do not depend on a picture of them."""
    try:
        write_page(build_page(), path)
    except Exception as error:  # whatever it is: everything else of the run is written, and stays
        return f"no {path.name} ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return str(path)
