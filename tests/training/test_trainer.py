"""Loggers by config, and what a run from Python leaves alone."""

import logging
import os
import signal
import threading
from dataclasses import asdict
from typing import ClassVar

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.loggers.logger import Logger

from dmt import config_io
from dmt.cli.main import distill_main
from dmt.distillation.module import DistillationModule
from dmt.errors import UserError
from dmt.tasks import run_task
from dmt.training import trainer as trainer_module
from dmt.training.run_dir import clear_run_name, current_run
from dmt.training.trainer import build_loggers, check_loggers


class RecordingLogger(Logger):
    """A user's logger, which records what is logged."""

    instances: ClassVar[list] = []

    def __init__(self, save_dir, run_name="none"):
        super().__init__()
        self.folder, self.run_name = save_dir, run_name
        self.metrics, self.hparams = {}, {}
        self.instances.append(self)

    @property
    def name(self):
        return "recording"

    @property
    def version(self):
        return self.run_name

    def log_metrics(self, metrics, step=None):
        self.metrics.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, params, *args, **kwargs):
        self.hparams = params


class NeedsAPackage(RecordingLogger):
    """A logger that fails as Lightning's do if their package is missing."""

    def __init__(self):
        raise ModuleNotFoundError("No module named 'some_tracker'", name="some_tracker")


def test_a_logger_by_class_path_gets_all_metrics(distill_args, tmp_path, monkeypatch):
    monkeypatch.setattr(RecordingLogger, "instances", [])
    path = f"{RecordingLogger.__module__}.{RecordingLogger.__name__}"
    assert distill_main([*distill_args, f"trainer.loggers=[tensorboard, csv, {path}]"]) == 0
    (logger,) = RecordingLogger.instances
    run_dir = tmp_path / "logs" / "version_0"
    assert (logger.folder, logger.run_name) == (str(run_dir), "version_0")
    config = config_io.load_config(run_dir / "config.yaml")
    assert logger.hparams["config"] == asdict(clear_run_name(config))
    names = {name for metrics in logger.metrics.values() for name in metrics}
    assert {"train/kl", "val/text/kl", "lr", "slots/dead/layer_0"} <= names
    assert set(logger.metrics) == set(range(9)), "each step, as trainer.log_every=1"
    assert (run_dir / "metrics.csv").is_file()


def test_the_default_loggers_write_into_the_run(tmp_path):
    tensorboard, csv = build_loggers(config_io.load_config(), tmp_path / "version_3")
    assert isinstance(tensorboard, TensorBoardLogger)
    assert isinstance(csv, CSVLogger)
    assert tensorboard.log_dir == csv.log_dir == str(tmp_path / "version_3")


def test_a_run_needs_no_logger(distill_args, tmp_path):
    assert distill_main([*distill_args, "trainer.loggers=[]"]) == 0
    run_dir = tmp_path / "logs" / "version_0"
    assert (run_dir / "report.html").is_file()
    assert not (run_dir / "metrics.csv").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", "'tensorbord' is no logger; give tensorboard, csv, wandb, mlflow"),
        ("nowhere.Logger", "nowhere.Logger needs the package nowhere, which is not installed"),
        ("pytorch_lightning.loggers.Nix", "pytorch_lightning.loggers has no class Nix"),
        ("pathlib.Path", "pathlib.Path is not a Lightning logger"),
    ],
)
def test_an_unknown_logger_is_refused_before_the_run(distill_args, tmp_path, capsys, name, message):
    assert distill_main([*distill_args, f"trainer.loggers=[{name}]"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=r"wandb needs the package wandb.*pip install wandb"):
        check_loggers(config_io.load_config(None, ["trainer.loggers=[wandb]"]))
    path = f"{NeedsAPackage.__module__}.{NeedsAPackage.__name__}"
    config = config_io.load_config(None, [f"trainer.loggers=[{path}]"])
    with pytest.raises(UserError, match="needs the package some_tracker"):
        build_loggers(config, tmp_path / "version_0")


def test_class_paths_of_both_lightning_packages_are_accepted(tmp_path):
    config = config_io.load_config(None, ["trainer.loggers=[lightning.pytorch.loggers.CSVLogger]"])
    (logger,) = build_loggers(config, tmp_path / "version_0")
    assert isinstance(logger, CSVLogger)


def test_a_run_from_python_prints_nothing_and_leaves_signals_alone(distill_args, capfd, caplog):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    hook, level = threading.excepthook, logging.getLogger("pytorch_lightning").level
    fills_memory = torch.utils.deterministic.fill_uninitialized_memory
    during = []
    module_hook = trainer_module.StopOnSignal.on_train_batch_end

    def record(self, *args):
        during.append(signal.getsignal(signal.SIGINT))
        assert not torch.utils.deterministic.fill_uninitialized_memory
        module_hook(self, *args)

    caplog.set_level(logging.INFO, "dmt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module.StopOnSignal, "on_train_batch_end", record)
        result = run_task(config_io.load_config(None, distill_args))
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""
    assert set(during) == {handlers[0]}
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert (threading.excepthook, logging.getLogger("pytorch_lightning").level) == (hook, level)
    assert torch.utils.deterministic.fill_uninitialized_memory == fills_memory
    assert result.student == result.run_dir / "student"
    assert result.record["fidelity"]["text"]["kl"] > 0
    assert any(message.startswith("teacher") for message in caplog.messages)


def test_cublas_is_deterministic_from_the_first_product(distill_args, monkeypatch):
    """It reads the setting once; calibration computes products before Lightning sets it."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    settings = []

    def load(*_):
        settings.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        raise UserError("far enough")

    monkeypatch.setattr("dmt.distillation.run.load_teacher", load)
    with pytest.raises(UserError, match="far enough"):
        run_task(config_io.load_config(None, distill_args))
    assert settings == [":4096:8"]


def test_a_run_from_python_works_in_a_thread(distill_args, tmp_path):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(run_task(config_io.load_config(None, distill_args)))
    )
    thread.start()
    thread.join()
    assert results[0].student.is_dir()
    assert current_run() is None


def test_an_interrupt_of_a_run_from_python_says_how_to_resume(distill_args, tmp_path, monkeypatch):
    training_step = DistillationModule.training_step

    def interrupt(self, *args):
        if self.global_step == 4:
            raise KeyboardInterrupt
        training_step(self, *args)

    monkeypatch.setattr(DistillationModule, "training_step", interrupt)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step 4; resume with: .*--resume"):
        run_task(config_io.load_config(None, distill_args))
    assert signal.getsignal(signal.SIGINT) == handler
    assert current_run() is None
