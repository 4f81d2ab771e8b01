"""How often each slot is read, as a picture with one cell a slot, layer by layer."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from math import sqrt
from typing import Any

READ, DEAD = (214, 120, 20), (116, 98, 214)
"""Red, green, blue of what is read, the more opaque the more often, and of what is never; both are seen on black and white."""
FAINTEST = 26
"""Opacity, of 255, of a cell that is read hardly ever."""
ACROSS = ((1_024, 32), (2_048, 64), (float("inf"), 96))
"""Up to how many cells a picture is how wide."""
BUSIEST = 3
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
    across: int
    down: int
    bands: list[str]
    words: str


def usage_maps(slots: Mapping[str, Mapping[str, Any]]) -> list[UsageMap]:
    """A map for each layer whose slots were counted, all with one scale; from `slots` in a run's record."""
    counted = {layer: used for layer, used in slots.items() if used.get("reads")}
    most = max((max(used["reads"]) / used["reads_of"] for used in counted.values()), default=0)
    return [_map(int(layer), used, max(1.0, most)) for layer, used in counted.items()]


def _map(layer: int, used: Mapping[str, Any], most: float) -> UsageMap:
    reads, each, tokens = used["reads"], int(used["reads_of"]), max(1, used["tokens"])
    across = next(width for most_cells, width in ACROSS if len(reads) <= most_cells)
    down = -(-len(reads) // across)
    bands = []
    for row in range(down):
        cells = reads[row * across : (row + 1) * across]
        best = max(range(len(cells)), key=cells.__getitem__)
        begin = row * across * each
        what = f"slots {begin:,} to {min(begin + len(cells) * each, int(used['slots'])) - 1:,}: {sum(cells):,} reads"
        bands.append(f"{what}, most by {_which(row * across + best, each)} ({_share(cells[best], tokens * each)} of tokens)")
    busiest = sorted(range(len(reads)), key=lambda cell: -reads[cell])[:BUSIEST]
    named = ", ".join(f"{_which(cell, each)} for {_share(reads[cell], tokens * each)}" for cell in busiest)
    words = f"{used['read']:.1f} of {used['slots']:,} slots are read for a token, {used['dead']:,.0f} never; most often {named}"
    return UsageMap(layer, _png(reads, each, most, across, down), across, down, bands, words)


def _which(cell: int, each: int) -> str:
    return f"slot {cell}" if each == 1 else f"the {each} slots from {cell * each:,} on"


def _share(reads: int, tokens: int) -> str:
    return f"{reads / tokens:.1%}".replace("%", " %")


def _png(reads: Sequence[int], each: int, most: float, across: int, down: int) -> str:
    from PIL import Image  # comes with TensorBoard; only where something is drawn

    cells = []
    for number in reads:
        # Of what is read seldom there is so much that a share itself would show nothing else, hence its root.
        strength = sqrt(number / each / most)
        cells.append((*READ, FAINTEST + round(strength * (255 - FAINTEST))) if number else (*DEAD, 255))
    image = Image.new("RGBA", (across, down))
    image.putdata(cells + [(0, 0, 0, 0)] * (across * down - len(cells)))
    written = BytesIO()
    image.save(written, "PNG", optimize=True)
    return "data:image/png;base64," + b64encode(written.getvalue()).decode()
