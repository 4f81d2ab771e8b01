"""Progress of a run: a bar in a terminal or a notebook, dated lines in a log file."""

import logging
import os
import re
import signal
import sys
from types import SimpleNamespace

import torch
from conftest import newest
from pytorch_lightning.callbacks import TQDMProgressBar

from dmt import progress
from dmt.cli.main import distill_main
from dmt.training import callbacks
from dmt.training.callbacks import (
    StepProgressBar,
    StepProgressLog,
    make_progress_callback,
)


def test_the_progress_display_suits_the_output(monkeypatch):
    assert isinstance(make_progress_callback(), StepProgressLog), "pytest captures stdout"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert isinstance(make_progress_callback(), StepProgressBar)
    shell = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert isinstance(make_progress_callback(), TQDMProgressBar)


def test_a_log_gets_a_dated_line_at_most_every_interval(monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    callback = StepProgressLog()
    trainer = SimpleNamespace(
        global_step=0,
        max_steps=1_200,
        is_global_zero=True,
        progress_bar_metrics={"loss": torch.tensor(0.25)},
    )
    caplog.set_level(logging.INFO, "dmt.progress")
    callback.on_train_start(trainer, None)
    for step in range(1, 13):  # 10 seconds each
        now[0] += 10
        trainer.global_step = step * 10
        callback.on_train_batch_end(trainer, None)
    assert len(caplog.messages) == 4
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  step 30/1,200  loss 0.25, about 20 minutes left",
        caplog.messages[0],
    )
    assert "step 120/1,200" in caplog.messages[-1]
    trainer.is_global_zero = False
    now[0] += 100
    callback.on_train_batch_end(trainer, None)
    assert len(caplog.messages) == 4, "the first process alone logs"


def test_a_run_logs_its_plan_and_its_parts(distill_args, capsys):
    assert distill_main(distill_args) == 0
    lines = capsys.readouterr().err.splitlines()
    text = " ".join(" ".join(lines).split())
    parts = (
        "tokenizing",
        "teacher",
        "layer 0-2 feed-forward block -> 8 of 64 slots",
        "trainable",
        "tokens in steps of 64",
        "calibrating",
        "cost of 0-2 reads",
        "measuring text (corpus 1/1)",
    )
    positions = [text.index(part) for part in parts]
    assert positions == sorted(positions)


def test_the_progress_bar_shows_steps_time_left_and_loss(distill_args, capsys, monkeypatch):
    monkeypatch.setattr("dmt.training.trainer.make_progress_callback", StepProgressBar)
    assert distill_main([*distill_args, "trainer.progress_bar=true"]) == 0
    bar = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("training"))
    assert "9/9" in bar
    assert bar.count(":") >= 4, "time gone and time left"
    assert "loss:" in bar
    assert "v_num" not in bar


def test_a_signal_during_the_all_reduce_is_not_lost(distill_args, tmp_path, monkeypatch, capsys):
    sent = []

    def all_reduce_max(number):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return number

    monkeypatch.setattr(callbacks, "all_reduce_max", all_reduce_max)
    assert distill_main(distill_args) == 128 + signal.SIGTERM
    assert "stopped after step 1; resume with" in capsys.readouterr().err
    assert not (newest(tmp_path) / "student").exists()
