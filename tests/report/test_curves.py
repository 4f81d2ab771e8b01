"""Curves of a run, as they are read and plotted."""

from dmt.report.curves import MAX_POINTS, get_layer_errors, overlay_curves, read_curves


def test_curves_continue_after_a_resume(tmp_path):
    (tmp_path / "metrics.before-20260101-000000.csv").write_text(
        "a,epoch,step\n1,0,0\n2,0,10\n3,0,20\nbroken"
    )
    (tmp_path / "metrics.csv").write_text("a,b,epoch,step\n2.5,,0,10\n3.5,nan,0,20\n,7,0,30\n\0")
    assert read_curves(tmp_path) == {"a": ([0, 10, 20], [1.0, 2.5, 3.5]), "b": ([30], [7.0])}
    assert read_curves(tmp_path / "missing") == {}


def test_long_curves_are_thinned_and_keep_their_last_point(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "a,step\n" + "".join(f"{step / 2},{step}\n" for step in range(1_000))
    )
    steps, values = read_curves(tmp_path)["a"]
    assert MAX_POINTS / 2 < len(steps) <= MAX_POINTS
    assert (steps[-1], values[-1]) == (999, 499.5)
    assert values == [step / 2 for step in steps]


def test_curves_of_training_and_validation_have_their_own_plots():
    curve = ([0, 1], [1.0, 0.5])
    plots = overlay_curves({"run": {"train/kl": curve, "val/a/b.txt/kl": curve, "lr": curve}})
    assert [plot.title for plot in plots] == ["KL from the teacher on validation text, a/b.txt"]


def test_layer_errors_are_ordered_by_layer():
    curves = {f"val/fvu/layer_{layer}": ([0], [float(layer)]) for layer in (10, 2, 0)}
    assert list(get_layer_errors(curves | {"val/a/kl": ([0], [1.0])})) == [0, 2, 10]
