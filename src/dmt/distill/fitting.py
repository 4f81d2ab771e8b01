"""Lightning's trainer as every task here uses it: loggers, checkpoints, progress, resume, threads."""

from __future__ import annotations

import ctypes
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from dmt.config import Config
from dmt.data.blocks import TextData
from dmt.distill.callbacks import Progress, StopOnSignal
from dmt.distill.checkpoints import Saver, WholeFiles
from dmt.distill.ending import Interrupted, told_at_its_end
from dmt.distill.folder import keep_metrics, newest_checkpoint
from dmt.distill.processes import rank
from dmt.errors import UserError
from dmt.memory.together import agreed, several
from dmt.models.attention import use_attention
from dmt.models.norms import use_norms

PROCESSES = 8
"""So many may share a CPU, however few its cores."""
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h


def compute_device(config: Config) -> torch.device:
    """Where `trainer.accelerator` computes."""
    name = config.trainer.accelerator
    if name in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if name in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def quiet() -> None:
    """Leave the screen to what matters for a person who watches a run."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Windows are in memory, so worker processes would only cost; the run folder is ours, so it may exist.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Experiment logs directory.*exists and is not empty.*")
    # A checkpoint holds the state after the step: a resumed run must not do the step twice.
    warnings.filterwarnings("ignore", message=".*Using ModelCheckpoint with manual optimization.*")
    # The order of windows is a function of the step alone (StepSampler), so there is no loader state to restore.
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")  # Lightning about torch
    warnings.filterwarnings("ignore", message=".*Checkpoint directory.*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*The dirpath has changed from.*")  # a run may be moved


def check_accelerator(config: Config) -> None:
    """Raise `UserError` where `trainer.accelerator` is not on this machine, before a run folder is made."""
    name = config.trainer.accelerator
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    there = [*(each for each, available in has.items() if available), *(["gpu"] if any(has.values()) else [])]
    if name not in ("auto", "cpu", *there):
        raise UserError(f"trainer.accelerator={name} is not on this machine; there is {', '.join(['cpu', *there])}; use auto")
    on_gpu = compute_device(config).type == "cuda"
    most, what = (torch.cuda.device_count(), "GPUs") if on_gpu else (max(PROCESSES, os.cpu_count() or 1), "processes at most")
    if config.trainer.devices > most:
        raise UserError(f"trainer.devices={config.trainer.devices}: there are {most} {what} here; name so many or fewer")


def keep_freed_memory() -> None:
    """Tell glibc to keep what the program frees instead of giving it back after every step.

    A step frees and asks again for the same memory; handing it to the system and faulting it in again took up to half
    of a step's time, of small models and large (EXPERIMENTS.md). Nothing happens where the C library is another.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)  # large blocks too come from the heap, not from mappings of their own
    mallopt(M_TRIM_THRESHOLD, -1)  # whose end is never given back
    mallopt(M_ARENA_MAX, 1)  # and which is one for all threads: what the backward pass frees, the next forward uses


@contextmanager
def computing(config: Config, *models: PreTrainedModel) -> Iterator[None]:
    """Let `models` compute as in training: attend by `trainer.attention`, norms steady; and as torch does again afterwards."""
    for model in models:
        use_attention(model, config.trainer.attention)
        use_norms(model, steady=True)
    try:
        yield
    finally:
        for model in models:
            use_attention(model, "sdpa")
            use_norms(model, steady=False)


class Board(TensorBoardLogger):
    """Curves of what was measured: not of the epoch, which Lightning adds to everything and which is always 0 here."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)


def fit(config: Config, module: pl.LightningModule, data: TextData, run: Path, callbacks: list[Callback]) -> None:
    """Train to the last step, from the newest checkpoint in `run` where there is one.

    Raises:
        Interrupted: a signal came; what there is to go on from was saved.
        UserError: a step met numbers that are not finite.
    """
    settings, steps = config.trainer, data.steps
    checkpoint = newest_checkpoint(run)
    if checkpoint and int(checkpoint.stem[5:]) >= steps:  # nothing is left to train, and loggers would begin files anew
        found = torch.load(checkpoint, weights_only=True, map_location="cpu")
        module.on_load_checkpoint(found)
        module.load_state_dict(found["state_dict"])
        return
    if checkpoint and rank() == 0:
        keep_metrics(run)
    where: dict[str, Any] = {"save_dir": str(run.parent), "name": "", "version": run.name}
    stop = StopOnSignal(run / "checkpoints")
    saver = Saver(
        run / "checkpoints", filename="step_{step}", auto_insert_metric_name=False, every_n_train_steps=settings.checkpoint_every,
        monitor="step", mode="max", save_top_k=2, save_on_exception=True,
        enable_version_counter=False,  # a step that is saved twice is the same
    )  # fmt: skip
    validate = settings.validate_every and min(settings.validate_every, steps)
    trainer = pl.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        # Buffers are alike at the start, and then by what they are made from; the layer-wise stage reaches memories alone.
        strategy=DDPStrategy(find_unused_parameters=True, forward_sync_buffers=False) if several() else "auto",
        precision=settings.precision,  # type: ignore[arg-type]
        max_steps=steps,
        max_epochs=-1,
        logger=[
            Board(**where, default_hp_metric=False),
            CSVLogger(**where, flush_logs_every_n_steps=1),
        ],
        callbacks=[*callbacks, stop, saver, *([Progress()] if settings.progress else [])],
        enable_progress_bar=settings.progress,
        enable_model_summary=False,
        log_every_n_steps=min(settings.log_every, steps),
        val_check_interval=validate or None,
        limit_val_batches=None if validate else 0,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        deterministic="warn",
        plugins=[WholeFiles()],
    )
    with told_at_its_end(config, run, stop):
        trainer.fit(module, datamodule=data, ckpt_path=str(checkpoint) if checkpoint else None, weights_only=True)
        last = run / "checkpoints" / f"step_{trainer.global_step}.ckpt"
        if not agreed(last.exists()):
            trainer.save_checkpoint(last)
    if stop.received is not None:
        raise Interrupted(stop.received, run)
