"""Plots and their axes."""

import re

import pytest

from dmt.report.svg import Series, draw_plot, format_tick, make_axis


def test_plots_show_points_and_names():
    plot = draw_plot(
        "a",
        "step",
        "b",
        [Series("one & two", [1, 10], [0.5, 0.25], ["x", "y"]), Series("", [1], [0.1])],
        log_axes="xy",
    )
    assert "one &amp; two" in plot.picture
    points = re.findall(r'translate\(([\d.]+) ([\d.]+)\)"><title>(.)', plot.picture)
    assert [tip for _, _, tip in points] == ["x", "y"]
    assert float(points[0][0]) < float(points[1][0]), "larger x are further right"
    assert float(points[0][1]) < float(points[1][1]), "larger y are further up"
    assert 'class="point c1" transform' in plot.picture, "a line of one point is drawn as a point"


def test_axes_have_round_ticks_and_room():
    for numbers, log, ticks in (
        ([0, 1_400], False, (0, 250, 500, 750, 1_000, 1_250)),
        ([0.031, 0.046], False, (0.0325, 0.035, 0.0375, 0.04, 0.0425, 0.045)),
        ([0.012, 0.3], True, (0.02, 0.05, 0.1, 0.2)),
        ([1e-7, 1], True, (1e-6, 1e-4, 0.01, 1)),
        ([0.0, 1.0], True, (0, 0.2, 0.4, 0.6, 0.8, 1)),  # zero has no logarithm: a linear axis
        ([3, 3], False, None),
        ([0], False, None),
        ([-2, -2], False, None),
        ([5], True, None),
        ([1.30, 1.31], True, None),
    ):
        axis = make_axis(numbers, log)
        assert ticks is None or axis.ticks == pytest.approx(ticks), (numbers, axis.ticks)
        assert len(axis.ticks) >= 2
        assert all(0 < axis.locate(number) < 1 for number in numbers)
        assert all(-0.01 <= axis.locate(tick) <= 1.01 for tick in axis.ticks)
    assert [format_tick(number) for number in (0, 0.05, 1_400, 20_000, 2.5e6, 1e-6)] == [
        "0",
        "0.05",
        "1400",
        "20k",
        "2.5M",
        "1e-06",
    ]


@pytest.mark.parametrize(
    ("numbers", "ticks"),
    [
        ([0, 3], (0, 1, 2, 3)),
        ([0, 1], (0, 1)),
        ([0], (0,)),
        ([7], (7,)),
        ([0, 11], (0, 2, 4, 6, 8, 10)),
        ([200, 1_400], (200, 400, 600, 800, 1_000, 1_200, 1_400)),
    ],
)
def test_integer_axes_have_whole_numbers_as_ticks(numbers, ticks):
    axis = make_axis(numbers, integer=True)
    assert axis.ticks == ticks
    assert all(0 < axis.locate(number) < 1 for number in numbers)


def test_plots_of_one_step_or_layer_have_one_tick():
    for x in ([0], [200]):
        plot = draw_plot("a", "step", "b", [Series("", x, [0.5], ["tip"])])
        ticks = re.findall(r'class="across" x="[\d.]+" y="[\d.]+">([^<]*)<', plot.picture)
        assert ticks == [str(x[0])]


def test_axes_of_fractions_keep_fractional_ticks():
    plot = draw_plot("a", "slots", "b", [Series("", [0.5, 2.0], [0.5, 0.1])])
    assert ">0.5<" in plot.picture
