"""Line plots as SVG for the report page: two axes, lines, points and a legend.

Colors are the page's own, light or dark, and no script is needed. matplotlib is not used: once it
is installed, torchmetrics, a dependency of Lightning, imports it at the start of every command,
which takes two of five seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

# Distances between ticks, as multiples of the largest power of ten below the length of the axis.
TICK_STEPS = (0.1, 0.2, 0.25, 0.5, 1.0, 2.0)
TARGET_TICKS = 6
AXIS_MARGIN = 0.04  # share of the axis that is left free at each end


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high`.

    Attributes:
        low, high: the numbers at its ends.
        is_log: whether the axis is logarithmic.
        ticks: the numbers that are written beside it.
    """

    low: float
    high: float
    is_log: bool
    ticks: tuple[float, ...]

    def locate(self, value: float) -> float:
        """Return the position of `value` along the axis, from 0 to 1."""
        low, high, value = (
            math.log(number) if self.is_log else number for number in (self.low, self.high, value)
        )
        return (value - low) / (high - low)


def make_axis(
    numbers: Sequence[float],
    log: bool = False,
    ticks: Sequence[float] = (),
    integer: bool = False,
) -> Axis:
    """Return an axis that shows all `numbers`.

    Args:
        numbers: what has to fit.
        log: whether the axis is logarithmic; ignored if a number is not positive.
        ticks: numbers written beside the axis, if not round ones.
        integer: whether ticks are whole numbers, as for steps and layers.
    """
    smallest, largest = min(numbers), max(numbers)
    log = log and smallest > 0
    if log:
        if smallest == largest:
            smallest, largest = smallest / 2, largest * 2
        margin = (largest / smallest) ** AXIS_MARGIN
        low, high = smallest / margin, largest * margin
    elif integer:
        margin = AXIS_MARGIN * (largest - smallest) or 0.5
        low, high = smallest - margin, largest + margin
    else:
        margin = AXIS_MARGIN * (largest - smallest) or abs(largest) / 2 or 0.5
        low, high = smallest - margin, largest + margin
    if ticks:
        axis_ticks = tuple(ticks)
    else:
        axis_ticks = _choose_log_ticks(low, high) if log else ()
        if len(axis_ticks) < 2:
            axis_ticks = _choose_linear_ticks(low, high, integer)
    return Axis(low, high, log, axis_ticks)


def format_tick(number: float) -> str:
    """Return a number as it is written beside an axis."""
    if number and abs(number) >= 10_000:
        return f"{number / 1_000:g}k" if abs(number) < 1e6 else f"{number / 1e6:g}M"
    return f"{number:.4g}" if abs(number) >= 1e-4 or not number else f"{number:.0e}"


def _choose_linear_ticks(low: float, high: float, integer: bool = False) -> tuple[float, ...]:
    """Return about `TARGET_TICKS` round numbers between the two."""
    unit = 10.0 ** math.floor(math.log10(high - low))
    steps = [step_size * unit for step_size in TICK_STEPS]
    if integer:
        steps = [step for step in steps if step >= 1 and step.is_integer()] or [1.0]
    candidates = []
    for step in steps:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        candidates.append(
            tuple(float(f"{number * step:.12g}") for number in range(first, last + 1))
        )
    return min(candidates, key=lambda ticks: abs(len(ticks) - TARGET_TICKS))


def _choose_log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Return powers of ten between the two; with few of them, also twice and five times each."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = -(-(last - first) // 6)
    multiples = (1, 2, 5) if last - first <= 3 else (1,)
    candidates = [
        float(f"{multiple}e{power}")
        for power in range(first, last + 1, stride)
        for multiple in multiples
    ]
    return tuple(number for number in candidates if low <= number <= high)


NUM_COLORS = 8  # colors of curves in page.css
# Dashes and shapes tell curves apart without colors.
DASH_PATTERNS = ("", "7 2.5", "1.5 2.5", "8 2.5 1.5 2.5")
MARKERS = (
    "M-3.4 0a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0 -6.8 0z",
    "M-3 -3h6v6h-6z",
    "M0 -4l3.9 7h-7.8z",
    "M0 -4.3l4 4.3l-4 4.3l-4 -4.3z",
    "M0 4l3.9 -7h-7.8z",
    "M-4 -1.3h2.7v-2.7h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7z",
)
# Size without the legend, in units of which letters are ten high: readable on a phone's screen.
PLOT_WIDTH, PLOT_HEIGHT = 360.0, 210.0
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 52.0, 8.0, 6.0, 36.0
LETTER_WIDTH = 5.6
LEGEND_ROW_HEIGHT = 16.0


@dataclass(frozen=True)
class Series:
    """One line of a plot.

    Attributes:
        name: its name in the legend; empty for no entry.
        x, y: coordinates of its points.
        tips: tooltips of the points; points are drawn only where there are tooltips.
        color: index of the color and the marker; several lines may share one.
        dash: index of the dash pattern.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    tips: Sequence[str] = ()
    color: int = 0
    dash: int = 0


@dataclass(frozen=True)
class Plot:
    """A plot of a page: its title, the SVG and a caption."""

    title: str
    picture: Markup
    caption: str = ""


@dataclass
class _Canvas:
    """Collects SVG elements; converts numbers on the two axes to coordinates."""

    x_axis: Axis
    y_axis: Axis
    parts: list[Markup] = field(default_factory=list)

    def x(self, value: float) -> str:
        width = PLOT_WIDTH - MARGIN_LEFT - MARGIN_RIGHT
        return f"{MARGIN_LEFT + self.x_axis.locate(value) * width:.1f}"

    def y(self, value: float) -> str:
        height = PLOT_HEIGHT - MARGIN_TOP - MARGIN_BOTTOM
        return f"{PLOT_HEIGHT - MARGIN_BOTTOM - self.y_axis.locate(value) * height:.1f}"

    def add(self, markup: str, *args: object) -> None:
        """Add markup; `args` are escaped."""
        self.parts.append(Markup(markup) % args)


def draw_plot(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    caption: str = "",
    log_axes: str = "",
    ticks: Sequence[float] = (),
) -> Plot:
    """Return a line plot.

    The x axis has whole numbers as ticks if all x are whole, as steps and layers are.

    Args:
        title: title of the plot.
        x_label: name of the x axis.
        y_label: name of the y axis.
        series: the lines; at least one point in all.
        caption: a sentence below the plot.
        log_axes: which axes are logarithmic: some of `x` and `y`.
        ticks: ticks of the x axis, if not round numbers.
    """
    x_values, y_values = (
        [value for curve in series for value in getattr(curve, coordinate)] for coordinate in "xy"
    )
    canvas = _Canvas(
        make_axis(x_values, "x" in log_axes, ticks, all(float(x).is_integer() for x in x_values)),
        make_axis(y_values, "y" in log_axes),
    )
    canvas.add("<title>%s</title>", f"{title}: {y_label} by {x_label}")
    _draw_grid(canvas, x_label, y_label)
    for curve in series:
        _draw_series(canvas, curve)
    height = _draw_legend(canvas, [curve for curve in series if curve.name])
    svg_tag = Markup('<svg viewBox="0 0 %s %s" role="img">') % (f"{PLOT_WIDTH:g}", f"{height:g}")
    return Plot(title, svg_tag + Markup("\n").join(canvas.parts) + Markup("</svg>"), caption)


def _draw_grid(canvas: _Canvas, x_label: str, y_label: str) -> None:
    bottom, right = PLOT_HEIGHT - MARGIN_BOTTOM, PLOT_WIDTH - MARGIN_RIGHT
    for tick in canvas.y_axis.ticks:
        position = canvas.y(tick)
        canvas.add('<path class="grid" d="M%s %sH%s"/>', MARGIN_LEFT, position, right)
        canvas.add(
            '<text class="up" x="%s" y="%s" dy=".35em">%s</text>',
            MARGIN_LEFT - 5,
            position,
            format_tick(tick),
        )
    for tick in canvas.x_axis.ticks:
        position = canvas.x(tick)
        canvas.add('<path class="grid" d="M%s %sV%s"/>', position, MARGIN_TOP, bottom)
        canvas.add(
            '<text class="across" x="%s" y="%s">%s</text>', position, bottom + 13, format_tick(tick)
        )
    canvas.add(
        '<text class="across name" x="%s" y="%s">%s</text>',
        (MARGIN_LEFT + right) / 2,
        PLOT_HEIGHT - 6,
        x_label,
    )
    middle = (MARGIN_TOP + bottom) / 2
    canvas.add(
        '<text class="across name" x="10" y="%s" transform="rotate(-90 10 %s)">%s</text>',
        middle,
        middle,
        y_label,
    )


def _draw_series(canvas: _Canvas, series: Series) -> None:
    color_number = series.color % NUM_COLORS + 1
    points = " ".join(
        f"{canvas.x(x)} {canvas.y(y)}" for x, y in zip(series.x, series.y, strict=True)
    )
    if len(series.x) > 1:
        canvas.add(
            '<path class="line c%s" stroke-dasharray="%s" d="M%s"/>',
            color_number,
            DASH_PATTERNS[series.dash % len(DASH_PATTERNS)] or "none",
            points,
        )
    shape = MARKERS[series.color % len(MARKERS)]
    if not series.tips and len(series.x) == 1:
        canvas.add(
            '<path class="point c%s" transform="translate(%s)" d="%s"/>',
            color_number,
            points,
            shape,
        )
    for x, y, tip in zip(series.x, series.y, series.tips, strict=False):
        canvas.add(
            '<g transform="translate(%s %s)"><title>%s</title>', canvas.x(x), canvas.y(y), tip
        )
        canvas.add(
            '<circle class="reach" r="9"/><path class="point c%s" d="%s"/></g>', color_number, shape
        )  # easier to hit


def _draw_legend(canvas: _Canvas, named_series: Sequence[Series]) -> float:
    """Add the names below the plot, in as many lines as needed; return the height with them."""
    x, y = MARGIN_LEFT - 20, PLOT_HEIGHT + 8
    for series in named_series:
        name = series.name if len(series.name) <= 50 else f"{series.name[:49]}…"
        entry_width = 34 + LETTER_WIDTH * len(name)
        if x > MARGIN_LEFT - 20 and x + entry_width > PLOT_WIDTH:
            x, y = MARGIN_LEFT - 20, y + LEGEND_ROW_HEIGHT
        color_number, dashes = (
            series.color % NUM_COLORS + 1,
            DASH_PATTERNS[series.dash % len(DASH_PATTERNS)] or "none",
        )
        canvas.add(
            '<path class="line c%s" stroke-dasharray="%s" d="M%s %sh22"/>',
            color_number,
            dashes,
            f"{x:.1f}",
            y,
        )
        if series.tips:
            canvas.add(
                '<path class="point c%s" transform="translate(%s %s)" d="%s"/>',
                color_number,
                f"{x + 11:.1f}",
                y,
                MARKERS[series.color % len(MARKERS)],
            )
        canvas.add('<text x="%s" y="%s" dy=".35em">%s</text>', f"{x + 27:.1f}", y, name)
        x += entry_width + 6
    return y + LEGEND_ROW_HEIGHT / 2 if named_series else PLOT_HEIGHT
