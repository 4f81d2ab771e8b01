"""`dmt consolidate`: options, JSON output, interruption."""

import json
import signal
from pathlib import Path

import pytest
from conftest import make_teacher, newest
from factories import consolidation

from dmt import config_io
from dmt.cli.main import main as dmt
from dmt.training.interrupts import RunInterrupted


@pytest.fixture
def long_folder(tokenizer, tmp_path):
    """A tiny teacher that reads enough for a context and something after it."""
    folder = tmp_path / "teacher"
    make_teacher(len(tokenizer), n_positions=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(long_folder, text_file, tmp_path):
    """Arguments of a consolidation that takes seconds."""
    return consolidation(long_folder, text_file, tmp_path, "context.prompt_length=3")


def test_options_become_settings(tiny, long_folder, tmp_path, capsys):
    file = next(word for word in tiny if word.startswith("context.file"))
    rest = [
        word
        for word in tiny
        if not word.startswith(
            ("task", "teacher", "context.file", "context.prompt_length", "stages")
        )
    ]
    args = [
        "consolidate",
        "--model",
        str(long_folder),
        "--file",
        file.partition("=")[2],
        "--target",
        "prompt",
        "--prompt-length",
        "3",
    ]
    assert dmt([*args, "--steps", "2", "--lr", "0.01", "--json", *rest]) == 0
    record = json.loads(capsys.readouterr().out)
    assert Path(record["run_dir"]) == newest(tmp_path)
    config = config_io.load_config(newest(tmp_path) / "config.yaml")
    assert (
        config.context.prompt_length,
        config.stages.end_to_end_steps,
        config.stages.end_to_end_lr,
    ) == (3, 2, 0.01)
    assert (
        dmt(
            [
                "consolidate",
                "Ada Holbrook: 5 = five",
                "--model",
                str(long_folder),
                "--row-method",
                "gradient",
                *rest,
            ]
        )
        == 0
    )
    assert (
        config_io.load_config(newest(tmp_path) / "config.yaml").context.text
        == "Ada Holbrook: 5 = five"
    )
    assert dmt(["consolidate", "x", "--nonsense"]) == 2


def test_an_interrupted_command_prints_how_to_resume(tiny, long_folder, monkeypatch, capsys):
    from dmt import tasks

    def stop(*_):
        raise RunInterrupted(signal.SIGINT, Path("runs/version_0"))

    monkeypatch.setitem(tasks.TASKS, "consolidate", stop)
    assert dmt(["consolidate", "Ada Fox sells hats.", "--model", str(long_folder)]) == 130
    assert "dmt distill --resume runs/version_0" in capsys.readouterr().err
