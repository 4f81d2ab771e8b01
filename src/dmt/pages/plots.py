"""Curves and points as SVG that stands in a page: colours are the page's own, light or dark, and it needs no script.

Drawn here and not by matplotlib: once that is installed, torchmetrics, which Lightning brings, imports it with every
`dmt` command, two seconds of five. These pictures need lines, points, two axes and a legend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from dmt.pages.axes import Axis, axis, written

COLOURS = 8
"""That the page has for curves."""
DASHES = ("", "7 2.5", "1.5 2.5", "8 2.5 1.5 2.5")
MARKERS = (
    "M-3.4 0a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0 -6.8 0z", "M-3 -3h6v6h-6z", "M0 -4l3.9 7h-7.8z", "M0 -4.3l4 4.3l-4 4.3l-4 -4.3z",
    "M0 4l3.9 -7h-7.8z", "M-4 -1.3h2.7v-2.7h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7z",
)  # fmt: skip
"""What tells curves apart where colour does not: dashes, and shapes about the point."""
WIDTH, HEIGHT = 360.0, 210.0
"""Of a picture without its legend, in units of which letters are ten high: legible on a telephone, as wide as its screen."""
LEFT, RIGHT, TOP, BOTTOM = 52.0, 8.0, 6.0, 36.0
LETTER = 5.6
"""Width of a letter, about."""
ROW = 16.0
"""Height of a line of the legend."""


@dataclass(frozen=True)
class Series:
    """One line of a plot.

    Attributes:
        name: in the legend; none without.
        x, y: of its points.
        tips: what a pointer that rests on a point is told; where there are some, points are drawn.
        colour: which of the colours, and which shape; several lines may share one.
        line: which kind of dashes.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    tips: Sequence[str] = ()
    colour: int = 0
    line: int = 0


@dataclass(frozen=True)
class Plot:
    """A plot as it stands in a page: what it is called, the picture, and what it says in words."""

    title: str
    picture: Markup
    words: str = ""


@dataclass
class _Canvas:
    """Where things are put, by numbers on two axes."""

    across: Axis
    up: Axis
    parts: list[Markup] = field(default_factory=list)

    def x(self, value: float) -> str:
        return f"{LEFT + self.across.share(value) * (WIDTH - LEFT - RIGHT):.1f}"

    def y(self, value: float) -> str:
        return f"{HEIGHT - BOTTOM - self.up.share(value) * (HEIGHT - TOP - BOTTOM):.1f}"

    def put(self, markup: str, *given: object) -> None:
        """Add a tag, with what is given escaped."""
        self.parts.append(Markup(markup) % given)


def plot(
    title: str, across: str, up: str, series: Sequence[Series], words: str = "", log: str = "", ticks: Sequence[float] = ()
) -> Plot:
    """Draw `series`; `log` names the axes, of `x` and `y`, that are logarithmic, `ticks` the numbers across that are shown."""
    x, y = ([number for each in series for number in getattr(each, name)] for name in "xy")
    canvas = _Canvas(axis(x, "x" in log, ticks), axis(y, "y" in log))
    canvas.put("<title>%s</title>", f"{title}: {up} by {across}")
    _grid(canvas, across, up)
    for each in series:
        _line(canvas, each)
    height = _legend(canvas, [each for each in series if each.name])
    opening = Markup('<svg viewBox="0 0 %s %s" role="img">') % (f"{WIDTH:g}", f"{height:g}")
    return Plot(title, opening + Markup("\n").join(canvas.parts) + Markup("</svg>"), words)


def _grid(canvas: _Canvas, across: str, up: str) -> None:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for tick in canvas.up.ticks:
        at = canvas.y(tick)
        canvas.put('<path class="grid" d="M%s %sH%s"/>', LEFT, at, right)
        canvas.put('<text class="up" x="%s" y="%s" dy=".35em">%s</text>', LEFT - 5, at, written(tick))
    for tick in canvas.across.ticks:
        at = canvas.x(tick)
        canvas.put('<path class="grid" d="M%s %sV%s"/>', at, TOP, bottom)
        canvas.put('<text class="across" x="%s" y="%s">%s</text>', at, bottom + 13, written(tick))
    canvas.put('<text class="across name" x="%s" y="%s">%s</text>', (LEFT + right) / 2, HEIGHT - 6, across)
    middle = (TOP + bottom) / 2
    canvas.put('<text class="across name" x="10" y="%s" transform="rotate(-90 10 %s)">%s</text>', middle, middle, up)


def _line(canvas: _Canvas, each: Series) -> None:
    number = each.colour % COLOURS + 1
    points = " ".join(f"{canvas.x(x)} {canvas.y(y)}" for x, y in zip(each.x, each.y, strict=True))
    if len(each.x) > 1:
        canvas.put(
            '<path class="line c%s" stroke-dasharray="%s" d="M%s"/>', number, DASHES[each.line % len(DASHES)] or "none", points
        )
    shape = MARKERS[each.colour % len(MARKERS)]
    if not each.tips and len(each.x) == 1:
        canvas.put('<path class="point c%s" transform="translate(%s)" d="%s"/>', number, points, shape)
    for x, y, tip in zip(each.x, each.y, each.tips, strict=False):
        canvas.put('<g transform="translate(%s %s)"><title>%s</title>', canvas.x(x), canvas.y(y), tip)
        canvas.put('<circle class="reach" r="9"/><path class="point c%s" d="%s"/></g>', number, shape)  # easier to hit


def _legend(canvas: _Canvas, named: Sequence[Series]) -> float:
    """Put names under the picture, in as many lines as they need; how high it is then."""
    x, y = LEFT - 20, HEIGHT + 8
    for each in named:
        name = each.name if len(each.name) <= 50 else f"{each.name[:49]}…"
        wide = 34 + LETTER * len(name)
        if x > LEFT - 20 and x + wide > WIDTH:
            x, y = LEFT - 20, y + ROW
        number, dashes = each.colour % COLOURS + 1, DASHES[each.line % len(DASHES)] or "none"
        canvas.put('<path class="line c%s" stroke-dasharray="%s" d="M%s %sh22"/>', number, dashes, f"{x:.1f}", y)
        if each.tips:
            canvas.put('<path class="point c%s" transform="translate(%s %s)" d="%s"/>', number, f"{x + 11:.1f}", y,
                       MARKERS[each.colour % len(MARKERS)])  # fmt: skip
        canvas.put('<text x="%s" y="%s" dy=".35em">%s</text>', f"{x + 27:.1f}", y, name)
        x += wide + 6
    return y + ROW / 2 if named else HEIGHT
