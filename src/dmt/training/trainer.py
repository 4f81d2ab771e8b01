"""Lightning's trainer as every task uses it: device, loggers, checkpoints, progress, resume."""

from __future__ import annotations

import ctypes
import inspect
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from dmt.config import Config
from dmt.data.windows import TextDataModule
from dmt.distributed import broadcast, is_distributed
from dmt.errors import UserError
from dmt.ops import set_layer_norms
from dmt.training.callbacks import StopOnSignal, make_progress_callback
from dmt.training.checkpoints import AtomicCheckpointIO, StepBoundaryCheckpoint
from dmt.training.interrupts import RunInterrupted, report_interruption
from dmt.training.launch import get_rank
from dmt.training.run_dir import archive_metrics, newest_checkpoint

LIBRARY_LOGGERS = ("pytorch_lightning", "lightning.pytorch")
MAX_CPU_PROCESSES = 8  # that may share a CPU, however few its cores
EVENT_FILE_PREFIX = "events.out.tfevents."  # followed by a time in seconds
# Eight buffers of 4 MiB, with which cuBLAS repeats its digits.
CUBLAS_WORKSPACE = ":4096:8"
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h
# Short names for `trainer.loggers`: class path and the package that the logger needs.
LOGGERS = {
    "tensorboard": ("dmt.training.trainer.EpochlessTensorBoardLogger", "tensorboard"),
    "csv": ("pytorch_lightning.loggers.CSVLogger", "pytorch_lightning"),
    "wandb": ("pytorch_lightning.loggers.WandbLogger", "wandb"),
    "mlflow": ("pytorch_lightning.loggers.MLFlowLogger", "mlflow"),
    "comet": ("pytorch_lightning.loggers.CometLogger", "comet_ml"),
    "neptune": ("pytorch_lightning.loggers.NeptuneLogger", "neptune"),
}
# Warnings of libraries that are wrong about these runs, and why.
EXPECTED_WARNINGS = (
    ".*does not have many workers.*",  # windows are in memory, so workers would only cost
    ".*Experiment logs directory.*exists and is not empty.*",  # the run folder is ours
    ".*Checkpoint directory.*exists and is not empty.*",
    ".*The dirpath has changed from.*",  # a run may be moved
    ".*Using ModelCheckpoint with manual optimization.*",  # it holds the state after the step
    ".*your dataloader is not resumable.*",  # the order of windows depends on the step alone
    ".*isinstance.treespec, LeafSpec.*",  # Lightning about torch
)


def select_device(config: Config) -> torch.device:
    """Return the device of `trainer.accelerator`."""
    name = config.trainer.accelerator
    if name in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if name in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def silence_libraries() -> None:
    """Silence log lines, progress bars and `EXPECTED_WARNINGS` of libraries, for commands."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in LIBRARY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence, within this, what `silence_libraries` silences for good."""
    loggers = [logging.getLogger(name) for name in LIBRARY_LOGGERS]
    levels = [logger.level for logger in loggers]
    verbosity = transformers_logging.get_verbosity()
    had_progress_bar = transformers_logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        silence_libraries()
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            transformers_logging.set_verbosity(verbosity)
            if had_progress_bar:
                transformers_logging.enable_progress_bar()


def check_accelerator(config: Config) -> None:
    """Raise `UserError` unless this machine has `trainer.accelerator` and enough devices."""
    name = config.trainer.accelerator
    availability = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    accelerators = [
        *(accelerator for accelerator, is_available in availability.items() if is_available),
        *(["gpu"] if any(availability.values()) else []),
    ]
    if name not in ("auto", "cpu", *accelerators):
        raise UserError(
            f"trainer.accelerator={name} is not on this machine;"
            f" give auto or one of {', '.join(['cpu', *accelerators])}"
        )
    on_gpu = select_device(config).type == "cuda"
    max_devices, limit = (
        (torch.cuda.device_count(), "this machine has {} GPUs")
        if on_gpu
        else (max(MAX_CPU_PROCESSES, os.cpu_count() or 1), "this machine runs up to {} processes")
    )
    if config.trainer.devices > max_devices:
        raise UserError(
            f"trainer.devices={config.trainer.devices}: {limit.format(max_devices)};"
            f" set at most {max_devices}"
        )


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next step; do nothing with another C library.

    A step frees and allocates the same memory again. Returning it to the system and faulting it in
    took up to half of a step's time (docs/experiments).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # TypeError: Windows
        return
    # Large blocks from the heap, its end never returned, one heap for all threads.
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
        mallopt(option, value)


@contextmanager
def prepare_determinism() -> Iterator[None]:
    """Prepare torch, inside the block, for the deterministic algorithms that `fit` chooses.

    cuBLAS reads its workspace setting at the first product. Lightning sets the same one, but when
    calibration has computed products already. Filling new tensors, which torch does with these
    algorithms, costs a launch each and no result depends on it.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = CUBLAS_WORKSPACE
    settings: Any = torch.utils.deterministic
    before, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = before


@contextmanager
def use_training_kernels(config: Config, *models: PreTrainedModel) -> Iterator[None]:
    """Make the LayerNorms of `models` deterministic inside the block."""
    for model in models:
        set_layer_norms(model, deterministic=True)
    try:
        yield
    finally:
        for model in models:
            set_layer_norms(model, deterministic=False)


class EpochlessTensorBoardLogger(TensorBoardLogger):
    """TensorBoard without the curve `epoch`, which Lightning adds and which is always 0 here."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log all metrics but `epoch`."""
        super().log_metrics(
            {name: value for name, value in metrics.items() if name != "epoch"}, step
        )


def check_loggers(config: Config) -> None:
    """Raise `UserError` unless all of `trainer.loggers` can be imported."""
    for name in config.trainer.loggers:
        _get_logger_class(name)


def _get_logger_class(name: str) -> type[Logger]:
    class_path, package = LOGGERS.get(name, (name, ""))
    if package and find_spec(package) is None:
        raise _make_missing_package_error(name, package)
    # The same classes under the name of Lightning's other distribution.
    class_path = class_path.replace("lightning.pytorch.", "pytorch_lightning.", 1)
    module_name, _, class_name = class_path.rpartition(".")
    accepted = f"give {', '.join(LOGGERS)}, or the path of a class as in my_package.MyLogger"
    if not module_name:
        raise UserError(f"trainer.loggers: {name!r} is no logger; {accepted}")
    try:
        logger_class = getattr(import_module(module_name), class_name)
    except ModuleNotFoundError as error:
        raise _make_missing_package_error(name, error.name or module_name) from None
    except AttributeError:
        raise UserError(
            f"trainer.loggers: {module_name} has no class {class_name}; {accepted}"
        ) from None
    if not (isinstance(logger_class, type) and issubclass(logger_class, Logger)):
        raise UserError(f"trainer.loggers: {name} is not a Lightning logger; {accepted}")
    return logger_class


def _make_missing_package_error(name: str, package: str) -> UserError:
    return UserError(
        f"trainer.loggers: {name} needs the package {package}, which is not installed;"
        f" install it (pip install {package.partition('.')[0]}) or leave {name} out"
    )


def build_loggers(config: Config, run_dir: Path, step: int = 0) -> list[Logger]:
    """Build the loggers of `trainer.loggers` for a run.

    Where the run has curves in TensorBoard already, those from `step` on are replaced.

    TensorBoard and CSV write into the run's folder. Other loggers get the run's folder and name by
    those of the arguments `save_dir`, `name` and `run_name` that they take. Lightning gives all
    of them the settings as hyperparameters.

    Raises:
        UserError: A logger is unknown or its package is not installed.
    """
    loggers: list[Logger] = []
    for name in config.trainer.loggers:
        logger_class = _get_logger_class(name)
        if issubclass(logger_class, TensorBoardLogger | CSVLogger):
            arguments: dict[str, Any] = {
                "save_dir": str(run_dir.parent),
                "name": "",
                "version": run_dir.name,
            }
            if issubclass(logger_class, TensorBoardLogger):
                arguments["default_hp_metric"] = False
                if make_event_files_older(run_dir):
                    arguments["purge_step"] = step
            else:
                arguments["flush_logs_every_n_steps"] = 1
            loggers.append(logger_class(**arguments))
            continue
        available = {"save_dir": str(run_dir), "name": run_dir.name, "run_name": run_dir.name}
        accepted = inspect.signature(logger_class).parameters
        arguments = {key: value for key, value in available.items() if key in accepted}
        try:
            loggers.append(logger_class(**arguments))
        except ModuleNotFoundError as error:
            raise _make_missing_package_error(name, error.name or str(error)) from None
    return loggers


def make_event_files_older(run_dir: Path) -> bool:
    """Let the event files of a run be older than one written now; return whether there are any.

    TensorBoard reads the files of a folder in the order of the times in their names, which is
    another one if the clock was set back in between.
    """
    paths = sorted(run_dir.glob(f"{EVENT_FILE_PREFIX}*"))
    latest = int(time.time()) - 1
    for path in reversed(paths):
        timestamp, _, rest = path.name.removeprefix(EVENT_FILE_PREFIX).partition(".")
        if timestamp.isdecimal() and int(timestamp) > latest:
            path.rename(path.with_name(f"{EVENT_FILE_PREFIX}{latest:010d}.{rest}"))
            latest -= 1
    return bool(paths)


def fit(
    config: Config,
    module: pl.LightningModule,
    data: TextDataModule,
    run_dir: Path,
    callbacks: list[Callback],
) -> None:
    """Train to the last step, from the newest checkpoint of the run if there is one.

    Args:
        config: The resolved settings.
        module: What to train; it optimizes by hand and counts `global_step`.
        data: Windows in the order of the steps.
        run_dir: Folder of the run.
        callbacks: Those of the task, beside progress, checkpoints and signals.

    Raises:
        RunInterrupted: A signal or Ctrl-C came; the message says how to resume.
        UserError: A step met numbers that are not finite.
    """
    trainer_config, steps = config.trainer, data.steps
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint and int(checkpoint.stem[5:]) >= steps:
        # Nothing is left to train, and loggers would overwrite their files.
        checkpoint_state = torch.load(checkpoint, weights_only=True, map_location="cpu")
        module.on_load_checkpoint(checkpoint_state)
        module.load_state_dict(checkpoint_state["state_dict"])
        return
    if checkpoint and get_rank() == 0:
        archive_metrics(run_dir)
    stop_callback = StopOnSignal(run_dir / "checkpoints")
    checkpoint_callback = StepBoundaryCheckpoint(
        run_dir / "checkpoints",
        filename="step_{step}",
        auto_insert_metric_name=False,
        every_n_train_steps=trainer_config.checkpoint_every,
        monitor="step",
        mode="max",
        save_top_k=2,
        save_on_exception=True,
        enable_version_counter=False,  # a step that is saved twice is the same
    )
    progress = make_progress_callback() if trainer_config.progress_bar else None
    val_interval = trainer_config.validate_every and min(trainer_config.validate_every, steps)
    trainer = pl.Trainer(
        accelerator=trainer_config.accelerator,
        devices=trainer_config.devices,
        # Buffers start and stay equal; the layer-wise stage trains memories alone.
        strategy=DDPStrategy(find_unused_parameters=True, forward_sync_buffers=False)
        if is_distributed()
        else "auto",
        precision=trainer_config.precision,  # type: ignore[arg-type]
        max_steps=steps,
        max_epochs=-1,
        logger=build_loggers(
            config, run_dir, int(checkpoint.stem[5:]) if checkpoint is not None else 0
        ),
        callbacks=[
            *callbacks,
            stop_callback,
            checkpoint_callback,
            *([progress] if progress is not None else []),
        ],
        enable_progress_bar=isinstance(progress, ProgressBar),
        enable_model_summary=False,
        log_every_n_steps=min(trainer_config.log_every, steps),
        val_check_interval=val_interval or None,
        limit_val_batches=None if val_interval else 0,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        deterministic="warn",
        plugins=[AtomicCheckpointIO()],
    )
    with report_interruption(config, run_dir, stop_callback):
        trainer.fit(
            module,
            datamodule=data,
            ckpt_path=str(checkpoint) if checkpoint else None,
            weights_only=True,
        )
        last_checkpoint = run_dir / "checkpoints" / f"step_{trainer.global_step}.ckpt"
        if not broadcast(last_checkpoint.exists()):
            trainer.save_checkpoint(last_checkpoint)
    if stop_callback.received_signal is not None:
        raise RunInterrupted(stop_callback.received_signal, run_dir)
