"""Progress lines of work that takes minutes."""

import logging

import pytest
import torch

from dmt import progress
from dmt.data.windows import token_stream
from dmt.evaluation.metrics import measure_fidelity
from dmt.progress import ProgressLog, humanize_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "about 5 seconds"),
        (31, "about 30 seconds"),
        (58, "about 1 minute"),
        (80, "about 1 minute"),
        (185, "about 3 minutes"),
        (4_800, "about 80 minutes"),
        (9_000, "about 2.5 hours"),
    ],
)
def test_durations_are_rounded_to_a_digit_or_two(seconds, text):
    assert humanize_duration(seconds) == text


def test_a_line_tells_how_far_the_work_is_and_how_long_it_takes(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO, "dmt.progress")
    log = ProgressLog("reading", 1_000, " pages", start=200)
    for done in (250, 300, 400):
        now[0] += 20.0
        log.update(done, "  fast")
    assert [message[21:] for message in caplog.messages] == [
        "reading 300/1,000 pages  fast, about 5 minutes left"
    ]


def test_tokenizing_and_measuring_show_signs_of_life(monkeypatch, caplog, tokenizer, teacher):
    monkeypatch.setattr(progress, "LOG_INTERVAL", 0.0)
    caplog.set_level(logging.INFO, "dmt.progress")
    token_stream(["a memory", "every row"], tokenizer, "tokenizing notes")
    assert "tokenizing notes 17/17 characters" in caplog.messages[-1]
    measure_fidelity(teacher, teacher, torch.randint(1, 300, (5, 8)), batch_size=2)
    assert "measuring 4/5 windows" in caplog.messages[-2]
    assert "measuring 5/5 windows" in caplog.messages[-1]
