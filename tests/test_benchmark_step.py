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
    monkeypatch.setattr(
        module, "keep_freed_memory", lambda: None
    )  # it would last for the other tests
    return module


def test_the_fast_step_computes_the_plain_loss_and_a_cached_one_nearly(step):
    rows = {
        row["way"]: row for row in step.rows("quick", repeats=1, threads=1, inside=True, chunk=48)
    }
    assert set(rows) >= {way for way in (*step.STEPS, *step.LOSSES) if way != "loss: liger"}
    for way, row in rows.items():
        assert row["seconds"] > 0, way
        assert "seconds_ratio" in row, way
    assert rows["loss: ours"]["value"] == pytest.approx(rows["loss: dense"]["value"], rel=1e-4)
    assert rows["loss: ours, cache"]["value"] == pytest.approx(
        rows["loss: dense"]["value"], rel=0.05
    )
    assert rows["ours, cache"]["value"] == pytest.approx(rows["ours"]["value"], rel=0.1, abs=1e-4)
