"""The plan at a run's start: how long it will take, by steps that were timed."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import LAYERS, newest

from dmt import config_io
from dmt.cli.main import distill_main
from dmt.config import AssociativeConfig, FeaturalConfig
from dmt.data.windows import TextDataModule
from dmt.distillation import run
from dmt.distillation.module import DistillationModule
from dmt.memory import AssociativeMemory
from dmt.memory.insert_policy import InsertPolicy
from dmt.models.conversion import convert, get_featural_memories
from dmt.training import time_estimate
from dmt.training.run_dir import read_record
from dmt.training.time_estimate import (
    StepTimes,
    estimate_duration,
    humanize_duration,
    measure_step_times,
)

TOKENS_OF_BUDGETS = 128
"""All of the test text, as it is short."""
PACE = StepTimes(layerwise=0.5, end_to_end=2.0, evaluation=0.001, generation=0.25)


@pytest.fixture
def data(words, tokenizer):
    config = config_io.load_config(None, words)
    found = TextDataModule(config, tokenizer, 9)
    found.setup()
    return found


def test_the_estimate_is_steps_times_their_pace(data):
    config = replace(data.settings, trainer=replace(data.settings.trainer, validate_every=0))
    whole = estimate_duration(config, PACE, data)
    assert whole.train == 4 * 0.5 + 5 * 2.0
    assert whole.total == whole.calibrate + whole.train + whole.measure
    twice = replace(config, stages=replace(config.stages, layerwise_steps=8, end_to_end_steps=10))
    assert estimate_duration(twice, PACE, data).train == 2 * whole.train
    assert estimate_duration(config, replace(PACE, end_to_end=4.0), data).train == 4 * 0.5 + 5 * 4.0
    slower = estimate_duration(config, replace(PACE, evaluation=0.002, generation=0.5), data)
    assert (slower.measure, slower.calibrate) == (
        pytest.approx(2 * whole.measure),
        pytest.approx(2 * whole.calibrate),
    )
    longer = estimate_duration(
        replace(config, data=replace(config.data, test_tokens=32)), PACE, data
    )
    assert whole.measure - longer.measure == pytest.approx(0.001 * (128 - 32) * (1 + 6 / 2)), (
        "once, and with five budgets"
    )


def test_validation_counts_each_time(data):
    never = replace(data.settings, trainer=replace(data.settings.trainer, validate_every=0))
    third, each = (
        replace(never, trainer=replace(never.trainer, validate_every=every)) for every in (3, 1)
    )
    none, three, nine = (
        estimate_duration(config, PACE, data).train for config in (never, third, each)
    )
    assert nine - none == pytest.approx(3 * (three - none))
    assert three - none == pytest.approx(3 * (2 * 0.001 * 64 + 0.25))


def test_of_a_resumed_run_the_rest_is_estimated(data):
    config = replace(data.settings, trainer=replace(data.settings.trainer, validate_every=0))
    rest = [
        estimate_duration(config, PACE, data, is_new=False, steps_done=done)
        for done in (0, 3, 4, 6, 9)
    ]
    assert [each.train for each in rest] == [12.0, 10.5, 10.0, 6.0, 0.0]
    assert {each.calibrate for each in rest} == {0.0}


def test_rows_take_more_the_more_of_the_training_writes_them(data):
    config = replace(data.settings, trainer=replace(data.settings.trainer, validate_every=0))
    assert estimate_duration(config, PACE, data).rows == 0

    def rows(*searching, of=config, **how):
        return estimate_duration(of, replace(PACE, row_search=searching), data, **how).rows

    measured = 128 + TOKENS_OF_BUDGETS * (5 + 1) / 2
    assert rows((0.0, 0.01)) == pytest.approx(0.01 * (5 * 64 * 2 + measured)), (
        "each token reads, and may be new"
    )
    assert rows((0.8, 0.01)) == pytest.approx(0.01 * (1 * 64 * 2 + measured))
    assert rows((0.8, 0.01), (0.0, 0.02)) == pytest.approx(rows((0.8, 0.01)) + rows((0.0, 0.02)))
    assert rows((0.0, 0.01), done=6) == pytest.approx(0.01 * (3 * 64 * 2 + measured))
    two = replace(config, trainer=replace(config.trainer, devices=2))
    assert rows((0.0, 0.01), of=two) == pytest.approx(0.01 * (5 * 64 * 1.5 + measured)), (
        "reads are shared, what is new is not"
    )
    checked = replace(config, trainer=replace(config.trainer, validate_every=2))
    assert rows((0.0, 0.01), of=checked) == pytest.approx(rows((0.0, 0.01)) + 0.01 * 2 * 2 * 64)


@pytest.mark.parametrize("index", ["exact", "bf16", "flat", "ivf", "hnsw"])
def test_a_search_is_timed_with_rows_as_it_will_be_made(index, monkeypatch):
    seen = []
    monkeypatch.setattr(time_estimate, "LINEAR_SEARCH_ROWS", 512)
    monkeypatch.setattr(time_estimate, "INDEX_SEARCH_ROWS", 128)
    monkeypatch.setattr(
        time_estimate,
        "_time_call",
        lambda act, device: seen.append(act()) or 0.5 * time_estimate.SEARCH_QUERIES,
    )
    memory = AssociativeMemory(
        16,
        4,
        None,
        "teacher",
        InsertPolicy(min_distance=0.1, merge_distance=0.1, capacity=2_048, decay=0.1),
        index=index,
    )
    linear = index in ("exact", "bf16", "flat")
    assert time_estimate._time_row_search(memory) == 0.5 * (2_048 / 512 if linear else 1)
    [found] = seen
    assert found.places.shape == (time_estimate.SEARCH_QUERIES, 4)
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
    assert humanize_duration(seconds) == said


@pytest.mark.parametrize(
    "memory", [FeaturalConfig(k=8), FeaturalConfig(mean_k=8), AssociativeConfig(k=8)], ids=str
)
def test_timing_takes_real_steps_and_leaves_nothing_behind(data, teacher, memory, monkeypatch):
    config = data.settings
    student, _ = convert(teacher, [memory] * LAYERS)
    module = DistillationModule(config, student.eval(), teacher)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    random = torch.get_rng_state()
    taken = []
    for name in ("_layerwise", "_end_to_end"):
        original = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *given, original=original, name=name: taken.append(name) or original(*given),
        )
    pace = measure_step_times(config, module, data)
    assert set(taken) == {"_layerwise", "_end_to_end"}
    assert min(pace.layerwise, pace.end_to_end, pace.evaluation, pace.generation) > 0
    assert len(pace.row_search) == (LAYERS if isinstance(memory, AssociativeConfig) else 0)
    assert all(begins == 0.8 and taken > 0 for begins, taken in pace.row_search)
    assert torch.equal(random, torch.get_rng_state())
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not student.training
    assert all(parameter.grad is None for parameter in student.parameters())
    assert all(
        each.read_counts is None and each.budget_counts is None
        for each in get_featural_memories(student).values()
    )


def test_a_stage_that_is_left_out_takes_no_time(data, teacher):
    config = replace(data.settings, stages=replace(data.settings.stages, layerwise_steps=0))
    student, _ = convert(teacher, [FeaturalConfig(k=8)] * LAYERS)
    assert (
        measure_step_times(config, DistillationModule(config, student, teacher), data).layerwise
        == 0
    )


def test_a_run_opens_with_its_plan(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "measure_step_times", lambda *_: PACE)
    assert distill_main(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.index(
        "time about 30 seconds: about 15 seconds to train, the rest to calibrate and measure"
    ) < shown.index("before training:")
    for part in (
        "teacher",
        "layer 0-2 feed-forward block -> 8 of 64 slots",
        "trainable",
        "tokens in steps of 64",
    ):
        assert part in shown
    record = read_record(newest(tmp_path))
    assert record["estimated"]["train"] == 12 + 3 * (2 * 0.001 * 64 + 0.25)
    assert record["estimated"]["rows"] == 0


def test_the_plan_of_a_run_with_rows_says_what_they_may_take(words, capsys, monkeypatch):
    monkeypatch.setattr(
        run, "measure_step_times", lambda *_: replace(PACE, row_search=((0.8, 0.1),))
    )
    assert distill_main([*words, "memory.kind=associative"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "time about 30 seconds, up to 1 minute more as rows are written: about 15 seconds to train"
        in shown
    )
    assert re.search(
        r"\(\d+ s to train were expected, \d+ s to measure, up to \d\d s more with rows\)", shown
    )
