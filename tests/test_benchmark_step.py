"""The benchmark of a step runs on a tiny shape, and its variants compute the same loss."""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "step.py"


@pytest.fixture
def step(monkeypatch):
    spec = importlib.util.spec_from_file_location("step", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # It would affect the other tests of this process.
    monkeypatch.setattr(module, "keep_freed_memory", lambda: None)
    return module


def test_all_variants_compute_nearly_the_same_loss(step):
    rows = {
        row["variant"]: row
        for row in step.measure_variants("quick", repeats=1, threads=1, inside=True, chunk=48)
    }
    assert set(rows) >= {
        variant for variant in (*step.STEPS, *step.LOSSES) if variant != "loss: liger"
    }
    for variant, row in rows.items():
        assert row["seconds"] > 0, variant
        assert "seconds_ratio" in row, variant
    assert rows["loss: ours"]["value"] == pytest.approx(rows["loss: dense"]["value"], rel=1e-4)
    assert rows["loss: ours, cache"]["value"] == pytest.approx(
        rows["loss: dense"]["value"], rel=0.05
    )
    assert rows["ours, cache"]["value"] == pytest.approx(rows["ours"]["value"], rel=0.1, abs=1e-4)
