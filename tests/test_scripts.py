"""`scripts/train_teacher.py` trains, stops and resumes; `scripts/gpu_check.sh` says what it saw."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from conftest import newest
from transformers import AutoModelForCausalLM

from dmt.models.loading import load_teacher
from dmt.training.module import TrainingModule

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "train_teacher.py"


def load_script():
    """Import the script as a module."""
    spec = spec_from_file_location("train_teacher", SCRIPT)
    module = module_from_spec(spec)
    sys.modules["train_teacher"] = module  # its dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def test_the_check_of_a_gpu_says_that_there_is_none():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    process = subprocess.run(
        [ROOT / "scripts" / "gpu_check.sh"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr == "error: torch sees no GPU here; run this where there is one\n"


def test_the_check_of_a_gpu_runs_on_the_second_device(tmp_path):
    path = tmp_path / "gpu.json"
    process = subprocess.run(
        [ROOT / "scripts" / "gpu_check.sh", str(path), "--dry-run"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert process.returncode == 0, process.stdout + process.stderr
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert {"parity", "facts", "token", "step", "precision", "default run"} == {
        row["check"] for row in rows
    }


@pytest.fixture(scope="module")
def script():
    return load_script()


@pytest.fixture
def tiny_args(text_file, tmp_path):
    """Arguments of a training that takes a second."""
    return [
        str(ROOT / "scripts" / "teacher.yaml"),
        f"data.corpora=[{text_file}]",
        "data.mixture_weights=[]",
        f"trainer.log_dir={tmp_path / 'logs'}",
        "data.seq_len=16",
        "data.batch_size=4",
        "data.micro_batch_size=2",
        "data.validation_tokens=32",
        "data.test_tokens=32",
        "model.width=16",
        "model.layers=2",
        "model.heads=2",
        "model.vocab_size=300",
        "stages.end_to_end_steps=6",
        "optim.warmup_steps=2",
        "trainer.num_threads=1",
        "trainer.precision=32-true",
        "trainer.accelerator=cpu",
        "trainer.log_every=1",
        "trainer.validate_every=3",
        "trainer.checkpoint_every=2",
        "trainer.progress_bar=false",
    ]


def read_curves(run_dir):
    """Every logged number of a run by step and name."""
    with (run_dir / "metrics.csv").open() as file:
        return {
            (int(row["step"]), name): float(value)
            for row in csv.DictReader(file)
            for name, value in row.items()
            if value and name not in ("step", "epoch")
        }


@pytest.mark.parametrize("name", ["teacher", "reader"])
def test_the_recipes_of_the_built_in_teachers_are_valid(script, name):
    config, model = script.load_settings(ROOT / "scripts" / f"{name}.yaml", [])
    assert config.stages.layerwise_steps == 0
    assert config.stages.end_to_end_steps in (9_000, 4_000)
    assert model.start == (None if name == "teacher" else "embedded")


def test_training_writes_a_teacher_and_a_record(script, tiny_args, tmp_path):
    output = tmp_path / "teacher"
    assert script.main([*tiny_args, "--output", str(output)]) == 0
    run_dir = newest(tmp_path)
    record = json.loads((run_dir / "run.json").read_text())
    assert record["fidelity"]["text"]["perplexity"] > 1
    assert record["curves"]["train/loss"][0] == list(range(6))
    assert "val/text/perplexity" in record["curves"]
    model, tokenizer = load_teacher(str(output))
    assert model.config.n_embd == 16
    assert len(tokenizer) == model.config.vocab_size
    again = tmp_path / "again"
    assert script.main([*tiny_args, f"model.start={output}", "--output", str(again)]) == 0
    assert AutoModelForCausalLM.from_pretrained(again).config.n_layer == 2


def test_a_stopped_training_resumes_to_the_same_weights(
    script, tiny_args, tmp_path, monkeypatch, capsys
):
    assert script.main([*tiny_args, "--output", str(tmp_path / "straight")]) == 0
    training_step = TrainingModule.training_step

    def interrupt(self, tokens, batch_idx):
        if self.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return training_step(self, tokens, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", interrupt)
    stopped_args = [*tiny_args, "--output", str(tmp_path / "resumed")]
    assert script.main(stopped_args) == 128 + signal.SIGTERM
    assert not (tmp_path / "resumed").exists()
    run_dir = newest(tmp_path)
    assert f"python scripts/train_teacher.py --resume {run_dir}" in capsys.readouterr().err
    monkeypatch.setattr(TrainingModule, "training_step", training_step)
    assert script.main(["--resume", str(run_dir)]) == 0
    straight, resumed = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("straight", "resumed")
    )
    assert straight == resumed
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_two_processes_train_the_same_teacher(script, tiny_args, tmp_path):
    args = [*tiny_args, "data.micro_batch_size=1", "--output", str(tmp_path / "teacher")]
    assert script.main(args) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [*command, "--nproc-per-node=2", str(SCRIPT), *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    single, parallel = (read_curves(tmp_path / "logs" / f"version_{number}") for number in range(2))
    assert set(single) == set(parallel)
    for key, value in single.items():
        assert parallel[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key


def test_a_loss_that_is_not_finite_ends_with_advice(script, tiny_args, tmp_path, capsys):
    diverging = ["stages.end_to_end_lr=1e30", "optim.warmup_steps=0"]
    assert script.main([*tiny_args, *diverging, "--output", str(tmp_path / "output")]) != 0
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"error: step \d: .* is not finite; nothing of this step was kept; "
        r".*scripts/train_teacher\.py .*stages\.end_to_end_lr=2\.5e\+29$",
        error,
    ), error
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.heads=3", "model.width=16 must be a multiple of model.heads=3"),
        ("model.vocab_size=100", "model.vocab_size must be at least 257, got 100"),
        ("model.layers=0", "model.layers must be at least 1, got 0"),
        ("model.depth=3", "model.depth is not a setting"),
        ("data.corpora=[nix.txt]", "data.corpora: no file or folder nix.txt; accepted are"),
        ("model.output=/proc/x", "model.output=/proc/x cannot be written"),
    ],
)
def test_a_wrong_setting_ends_in_one_line(script, tiny_args, tmp_path, capsys, change, message):
    args = [*tiny_args, f"model.output={tmp_path / 'output'}", change]
    assert script.main(args) != 0
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_without_a_run_cannot_be_resumed(script, tmp_path, capsys):
    assert script.main(["--resume", str(tmp_path)]) == 2
    assert "no run of this script is there" in capsys.readouterr().err
