"""The benchmark of a step runs, on a tiny shape, and says what it promises."""

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
    )  # which would last for the other tests
    return module


def test_ours_does_what_the_obvious_way_does_and_with_a_cache_nearly(step):
    found = {
        row["way"]: row for row in step.rows("quick", repeats=1, threads=1, inside=True, chunk=48)
    }
    assert set(found) >= {way for way in (*step.STEPS, *step.LOSSES) if way != "loss: liger"}
    for way, row in found.items():
        assert row["seconds"] > 0, way
        assert "seconds_ratio" in row, way
    assert found["loss: ours"]["value"] == pytest.approx(found["loss: dense"]["value"], rel=1e-4)
    assert found["loss: ours, cache"]["value"] == pytest.approx(
        found["loss: dense"]["value"], rel=0.05
    )
    assert found["ours, cache"]["value"] == pytest.approx(found["ours"]["value"], rel=0.1, abs=1e-4)
