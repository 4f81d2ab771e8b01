"""The number of threads and the precision of a run: timed once, then the same for each run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dmt.config import Config, TrainerConfig
from dmt.errors import UserError
from dmt.training import autotune


def set_timings(monkeypatch, seconds, cores):
    """Pretend to be an idle machine on which a step takes `seconds[threads, use_bf16]`."""
    monkeypatch.setattr(
        autotune,
        "_time_training_step",
        lambda model, windows, threads, use_bf16: seconds[threads, use_bf16],
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(autotune, "is_machine_idle", lambda: True)


@pytest.mark.parametrize(
    ("seconds", "threads", "precision"),
    [
        ({(1, False): 1.0, (4, False): 3.0, (1, True): 0.8}, 1, "bf16-mixed"),
        ({(1, False): 2.0, (4, False): 1.0, (4, True): 0.9}, 4, "32-true"),
    ],
)
def test_the_fastest_threads_and_precision_are_chosen(
    teacher, tokens, monkeypatch, seconds, threads, precision
):
    set_timings(monkeypatch, seconds, cores=4)
    thread_settings = []
    monkeypatch.setattr(torch, "set_num_threads", thread_settings.append)
    tuned = autotune.autotune(Config(), teacher, tokens)
    assert (tuned.trainer.num_threads, tuned.trainer.precision) == (threads, precision)
    assert thread_settings == [threads]
    assert autotune.autotune(tuned, teacher, tokens) == tuned


def test_a_decision_is_made_once_per_machine(teacher, tokens, monkeypatch):
    seconds = {(1, False): 1.0, (2, False): 3.0, (1, True): 0.5, (2, True): 0.1}
    set_timings(monkeypatch, seconds, cores=2)
    tuned = autotune.autotune(Config(), teacher, tokens)
    seconds |= {(1, False): 9.0}
    assert autotune.autotune(Config(), teacher, tokens) == tuned, (
        "otherwise two runs of one command could differ"
    )

    def get_threads(config=None, windows=tokens):
        return autotune.autotune(config or Config(), teacher, windows).trainer.num_threads

    assert get_threads(windows=tokens[:1]) == 2, "another batch is timed on its own"
    assert get_threads(replace(Config(), trainer=TrainerConfig(precision="32-true"))) == 2
    version = autotune.AUTOTUNE_VERSION
    for content in (
        f'{{"format": {version + 1}, "decisions": {{}}}}',
        "",
        f'{{"format": {version}, "decisions": {{"a": 1}}}}',
        "[]",
    ):
        autotune.get_autotune_path().write_text(content)
        assert get_threads() == 2, "timed again"
    document = json.loads(autotune.get_autotune_path().read_text())
    for decision in document["decisions"].values():
        decision["num_threads"] = {"1": "1; rm"}
    autotune.get_autotune_path().write_text(json.dumps(document))
    assert get_threads() == 2
    monkeypatch.setattr(autotune, "get_autotune_path", lambda: Path("/proc/nowhere/autotune.json"))
    assert get_threads() == 2, "a folder that cannot be written to does not stop a run"

    def fail():
        raise UserError("this user has no home folder")

    monkeypatch.setattr(autotune, "get_autotune_path", fail)
    assert get_threads() == 2, "nor does a user without a home folder"


def test_precision_does_not_depend_on_processes_and_threads(teacher, tokens, monkeypatch):
    """Otherwise one process and two would agree to the digit on some machines alone."""
    seconds = {(1, False): 3.0, (2, False): 2.0, (4, False): 1.0, (4, True): 0.5}
    set_timings(monkeypatch, seconds, cores=4)
    first = autotune.autotune(Config(), teacher, tokens).trainer
    assert (first.num_threads, first.precision) == (4, "bf16-mixed")
    seconds |= {(1, True): 9.0, (2, True): 9.0}
    for trainer_config, threads in (
        (TrainerConfig(devices=2), 2),
        (TrainerConfig(num_threads=1), 1),
        (TrainerConfig(), 4),
    ):
        config = replace(Config(), trainer=trainer_config)
        trainer = autotune.autotune(config, teacher, tokens).trainer
        assert (trainer.num_threads, trainer.precision) == (threads, first.precision)
    (decision,) = json.loads(autotune.get_autotune_path().read_text())["decisions"].values()
    assert decision["num_threads"] == {"1": 4, "2": 2}


def test_a_decision_of_a_busy_machine_holds_until_it_is_idle(teacher, tokens, monkeypatch):
    seconds = {(1, False): 1.0, (2, False): 3.0, (1, True): 0.5, (2, True): 0.1}
    set_timings(monkeypatch, seconds, cores=2)
    thread_counts = []
    for idle in (False, False, True, True, False):
        monkeypatch.setattr(autotune, "is_machine_idle", lambda idle=idle: idle)
        thread_counts.append(autotune.autotune(Config(), teacher, tokens).trainer.num_threads)
        seconds[1, False] += 1.5
    assert thread_counts == [1, 1, 2, 2, 2]


def test_timing_a_step_leaves_no_gradient(teacher, tokens):
    teacher.requires_grad_(True)
    assert autotune._time_training_step(teacher, tokens, 1, use_bf16=True) > 0
    assert all(p.grad is None for p in teacher.parameters())
