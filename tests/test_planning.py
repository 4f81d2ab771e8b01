"""The plan at a run's start: how long it will take, by steps that were timed."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import LAYERS, newest

from dmt import settings
from dmt.config import LossConfig, MemoryConfig
from dmt.data.blocks import TextData
from dmt.distill import planning, run
from dmt.distill.folder import read_record
from dmt.distill.module import Distiller
from dmt.distill.planning import Pace, about, estimated, timed
from dmt.main import main
from dmt.memory import AssociativeMemory
from dmt.memory.admission import Policy
from dmt.models.surgery import featural_of, transplant

TOKENS_OF_BUDGETS = 128
"""All of the test text, as it is short."""
PACE = Pace(layerwise=0.5, end_to_end=2.0, reading=0.001, saying=0.25)


@pytest.fixture
def data(words, tokenizer):
    config = settings.load(None, words)
    found = TextData(config, tokenizer, 9)
    found.setup()
    return found


def test_the_estimate_is_steps_times_their_pace(data):
    config = replace(data.settings, trainer=replace(data.settings.trainer, validate_every=0))
    whole = estimated(config, PACE, data)
    assert whole.train == 4 * 0.5 + 5 * 2.0
    assert whole.total == whole.calibrate + whole.train + whole.measure
    twice = replace(config, stages=replace(config.stages, layerwise_steps=8, end_to_end_steps=10))
    assert estimated(twice, PACE, data).train == 2 * whole.train
    assert estimated(config, replace(PACE, end_to_end=4.0), data).train == 4 * 0.5 + 5 * 4.0
    slower = estimated(config, replace(PACE, reading=0.002, saying=0.5), data)
    assert (slower.measure, slower.calibrate) == (pytest.approx(2 * whole.measure), pytest.approx(2 * whole.calibrate))
    longer = estimated(replace(config, data=replace(config.data, test_tokens=32)), PACE, data)
    assert whole.measure - longer.measure == pytest.approx(0.001 * (128 - 32) * (1 + 6 / 2)), "once, and with five budgets"


def test_validation_counts_each_time(data):
    never = replace(data.settings, trainer=replace(data.settings.trainer, validate_every=0))
    third, each = (replace(never, trainer=replace(never.trainer, validate_every=every)) for every in (3, 1))
    none, three, nine = (estimated(config, PACE, data).train for config in (never, third, each))
    assert nine - none == pytest.approx(3 * (three - none))
    assert three - none == pytest.approx(3 * (2 * 0.001 * 64 + 0.25))


def test_of_a_resumed_run_the_rest_is_estimated(data):
    config = replace(data.settings, trainer=replace(data.settings.trainer, validate_every=0))
    rest = [estimated(config, PACE, data, fresh=False, done=done) for done in (0, 3, 4, 6, 9)]
    assert [each.train for each in rest] == [12.0, 10.5, 10.0, 6.0, 0.0]
    assert {each.calibrate for each in rest} == {0.0}


def test_rows_take_more_the_more_of_the_training_writes_them(data):
    config = replace(data.settings, trainer=replace(data.settings.trainer, validate_every=0))
    assert estimated(config, PACE, data).rows == 0

    def rows(*searching, of=config, **how):
        return estimated(of, replace(PACE, searching=searching), data, **how).rows

    measured = 128 + TOKENS_OF_BUDGETS * (5 + 1) / 2
    assert rows((0.0, 0.01)) == pytest.approx(0.01 * (5 * 64 * 2 + measured)), "each token reads, and may be new"
    assert rows((0.8, 0.01)) == pytest.approx(0.01 * (1 * 64 * 2 + measured))
    assert rows((0.8, 0.01), (0.0, 0.02)) == pytest.approx(rows((0.8, 0.01)) + rows((0.0, 0.02)))
    assert rows((0.0, 0.01), done=6) == pytest.approx(0.01 * (3 * 64 * 2 + measured))
    two = replace(config, trainer=replace(config.trainer, devices=2))
    assert rows((0.0, 0.01), of=two) == pytest.approx(0.01 * (5 * 64 * 1.5 + measured)), "reads are shared, what is new is not"
    checked = replace(config, trainer=replace(config.trainer, validate_every=2))
    assert rows((0.0, 0.01), of=checked) == pytest.approx(rows((0.0, 0.01)) + 0.01 * 2 * 2 * 64)


@pytest.mark.parametrize("index", ["exact", "half", "flat", "ivf", "hnsw"])
def test_a_search_is_timed_with_rows_as_it_will_be_made(index, monkeypatch):
    seen = []
    monkeypatch.setattr(planning, "SEARCHED", 512)
    monkeypatch.setattr(planning, "INDEXED", 128)
    monkeypatch.setattr(planning, "_seconds", lambda act, device: seen.append(act()) or 0.5 * planning.QUERIES)
    memory = AssociativeMemory(16, 4, None, "teacher", Policy(novelty=0.1, recombine=0.1, capacity=2_048, decay=0.1), index=index)
    linear = index in ("exact", "half", "flat")
    assert planning._search_seconds(memory) == 0.5 * (2_048 / 512 if linear else 1)
    [found] = seen
    assert found.places.shape == (planning.QUERIES, 4)
    assert found.distances.isfinite().all()
    assert len(memory.rows) == 0


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.2, "about 5 seconds"),
        (31, "about 30 seconds"),
        (58, "about 1 minute"),
        (185, "about 3 minutes"),
        (9_000, "about 2.5 hours"),
    ],
)
def test_a_length_of_time_as_people_say_it(seconds, said):
    assert about(seconds) == said


@pytest.mark.parametrize("memory", [{"k": 8}, {"k": "auto", "budget": 8}, {"kind": "associative", "k": 8}], ids=str)
def test_timing_takes_real_steps_and_leaves_nothing_behind(data, teacher, memory, monkeypatch):
    config = replace(data.settings, loss=LossConfig(revive=0.1))
    student, _ = transplant(teacher, [replace(MemoryConfig(), **memory)] * LAYERS)
    module = Distiller(config, student.eval(), teacher)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert any(name.startswith("idle_") for name in before)
    random = torch.get_rng_state()
    taken = []
    for name in ("_layerwise", "_end_to_end"):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, original=original, name=name: taken.append(name) or original(*given))
    pace = timed(config, module, data)
    assert set(taken) == {"_layerwise", "_end_to_end"}
    assert min(pace.layerwise, pace.end_to_end, pace.reading, pace.saying) > 0
    assert len(pace.searching) == (LAYERS if "kind" in memory else 0)
    assert all(begins == 0.8 and taken > 0 for begins, taken in pace.searching)
    assert torch.equal(random, torch.get_rng_state())
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not student.training
    assert all(parameter.grad is None for parameter in student.parameters())
    assert all(each.reads is None and each.spent is None for each in featural_of(student).values())


def test_a_stage_that_is_left_out_takes_no_time(data, teacher):
    config = replace(data.settings, stages=replace(data.settings.stages, layerwise_steps=0))
    student, _ = transplant(teacher, [MemoryConfig(k=8)] * LAYERS)
    assert timed(config, Distiller(config, student, teacher), data).layerwise == 0


def test_a_run_opens_with_its_plan(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "timed", lambda *_: PACE)
    assert main(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.index("time about 30 seconds: about 15 seconds to train, the rest to calibrate and measure") < shown.index(
        "before training:"
    )
    for part in ("teacher", "layer 0-2 feed-forward block -> 8 of 64 slots", "trainable", "tokens in steps of 64"):
        assert part in shown
    record = read_record(newest(tmp_path))
    assert record["estimated"]["train"] == 12 + 3 * (2 * 0.001 * 64 + 0.25)
    assert record["estimated"]["rows"] == 0


def test_the_plan_of_a_run_with_rows_says_what_they_may_take(words, capsys, monkeypatch):
    monkeypatch.setattr(run, "timed", lambda *_: replace(PACE, searching=((0.8, 0.1),)))
    assert main([*words, "memory.kind=associative"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "time about 30 seconds, up to 1 minute more as rows are written: about 15 seconds to train" in shown
    assert re.search(r"\(\d+ s to train were expected, \d+ s to measure, up to \d\d s more with rows\)", shown)
