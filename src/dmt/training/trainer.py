"""Lightning's trainer as every task here uses it: loggers, checkpoints, progress, resume, threads.

What every LightningModule here shares about a step: its rate, AdamW, gradients of pieces and of processes.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import warnings
from collections.abc import Container, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from dmt.config import Config, OptimConfig
from dmt.data.windows import TextDataModule
from dmt.distributed import broadcast, is_distributed
from dmt.errors import UserError
from dmt.ops import set_attention, set_layer_norms
from dmt.training.callbacks import StepProgressBar, StopOnSignal
from dmt.training.checkpoints import AtomicCheckpointIO, StepBoundaryCheckpoint
from dmt.training.interrupts import RunInterrupted, report_interruption
from dmt.training.launch import get_rank
from dmt.training.run_dir import archive_metrics, newest_checkpoint


def no_sync(module: pl.LightningModule, is_last: bool) -> AbstractContextManager[None]:
    """Within, gradients stay with each of several processes, `until` it is a step's last piece: then they are averaged."""
    if is_last or not is_distributed():
        return nullcontext()
    strategy = module.trainer.strategy
    assert isinstance(strategy, DDPStrategy), "several processes train by DDP alone"
    return strategy.block_backward_sync()


def lr_schedule(step: int, total_steps: int, peak_lr: float, optim: OptimConfig) -> float:
    """Linear warm-up to `peak`, then a cosine down to `final_lr` of it at the last step of the stage."""
    warmup = min(optim.warmup_steps, total_steps // 2)
    if step < warmup:
        return peak_lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    return peak_lr * (
        optim.min_lr_ratio
        + (1 - optim.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    )


def k_schedule(step: int, total_steps: int, start_factor: float) -> float:
    """Slots read as a multiple of k: from `start` down to 1 at the middle of the stage, by equal factors a step."""
    return start_factor ** max(0.0, 1 - 2 * step / max(1, total_steps))


def build_adamw(
    parameters: Any, optim: OptimConfig, value_ids: Container[int] = ()
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only; tensors whose `id` is in `values` have `values_lr` times the rate."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for parameter in parameters:
        lr_scale = optim.value_lr_scale if id(parameter) in value_ids else 1.0
        groups.setdefault(
            (optim.weight_decay if parameter.dim() > 1 else 0.0, lr_scale), []
        ).append(parameter)
    param_groups = [
        {"params": params, "weight_decay": weight_decay, "lr_scale": lr_scale}
        for (weight_decay, lr_scale), params in groups.items()
    ]
    return torch.optim.AdamW(param_groups, lr=0.0, betas=(optim.beta1, optim.beta2))


MAX_CPU_PROCESSES = 8
"""So many may share a CPU, however few its cores."""
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h


def select_device(config: Config) -> torch.device:
    """Where `trainer.accelerator` computes."""
    name = config.trainer.accelerator
    if name in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if name in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def silence_libraries() -> None:
    """Leave the screen to what matters for a person who watches a run."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Windows are in memory, so worker processes would only cost; the run folder is ours, so it may exist.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings(
        "ignore", message=".*Experiment logs directory.*exists and is not empty.*"
    )
    # A checkpoint holds the state after the step: a resumed run must not do the step twice.
    warnings.filterwarnings("ignore", message=".*Using ModelCheckpoint with manual optimization.*")
    # The order of windows is a function of the step alone (StepSampler), so there is no loader state to restore.
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    warnings.filterwarnings(
        "ignore", message=".*isinstance.treespec, LeafSpec.*"
    )  # Lightning about torch
    warnings.filterwarnings("ignore", message=".*Checkpoint directory.*exists and is not empty.*")
    warnings.filterwarnings(
        "ignore", message=".*The dirpath has changed from.*"
    )  # a run may be moved


def check_accelerator(config: Config) -> None:
    """Raise `UserError` where `trainer.accelerator` is not on this machine, before a run folder is made."""
    name = config.trainer.accelerator
    availability = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    accelerators = [
        *(accelerator for accelerator, is_available in availability.items() if is_available),
        *(["gpu"] if any(availability.values()) else []),
    ]
    if name not in ("auto", "cpu", *accelerators):
        raise UserError(
            f"trainer.accelerator={name} is not on this machine; there is {', '.join(['cpu', *accelerators])}; use auto"
        )
    on_gpu = select_device(config).type == "cuda"
    max_devices, device_noun = (
        (torch.cuda.device_count(), "GPUs")
        if on_gpu
        else (max(MAX_CPU_PROCESSES, os.cpu_count() or 1), "processes at most")
    )
    if config.trainer.devices > max_devices:
        raise UserError(
            f"trainer.devices={config.trainer.devices}: there are {max_devices} {device_noun} here; name so many or fewer"
        )


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
    mallopt(
        M_ARENA_MAX, 1
    )  # and which is one for all threads: what the backward pass frees, the next forward uses


@contextmanager
def use_training_kernels(config: Config, *models: PreTrainedModel) -> Iterator[None]:
    """Let `models` compute as in training: attend by `trainer.attention`, norms steady; and as torch does again afterwards."""
    for model in models:
        set_attention(model, config.trainer.attention)
        set_layer_norms(model, deterministic=True)
    try:
        yield
    finally:
        for model in models:
            set_attention(model, "sdpa")
            set_layer_norms(model, deterministic=False)


class EpochlessTensorBoardLogger(TensorBoardLogger):
    """Curves of what was measured: not of the epoch, which Lightning adds to everything and which is always 0 here."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(
            {name: value for name, value in metrics.items() if name != "epoch"}, step
        )


def fit(
    config: Config,
    module: pl.LightningModule,
    data: TextDataModule,
    run_dir: Path,
    callbacks: list[Callback],
) -> None:
    """Train to the last step, from the newest checkpoint in `run` where there is one.

    Raises:
        Interrupted: a signal came; what there is to go on from was saved.
        UserError: a step met numbers that are not finite.
    """
    trainer_config, steps = config.trainer, data.steps
    checkpoint = newest_checkpoint(run_dir)
    if (
        checkpoint and int(checkpoint.stem[5:]) >= steps
    ):  # nothing is left to train, and loggers would begin files anew
        checkpoint_state = torch.load(checkpoint, weights_only=True, map_location="cpu")
        module.on_load_checkpoint(checkpoint_state)
        module.load_state_dict(checkpoint_state["state_dict"])
        return
    if checkpoint and get_rank() == 0:
        archive_metrics(run_dir)
    logger_args: dict[str, Any] = {
        "save_dir": str(run_dir.parent),
        "name": "",
        "version": run_dir.name,
    }
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
    val_interval = trainer_config.validate_every and min(trainer_config.validate_every, steps)
    trainer = pl.Trainer(
        accelerator=trainer_config.accelerator,
        devices=trainer_config.devices,
        # Buffers are alike at the start, and then by what they are made from; the layer-wise stage reaches memories alone.
        strategy=DDPStrategy(find_unused_parameters=True, forward_sync_buffers=False)
        if is_distributed()
        else "auto",
        precision=trainer_config.precision,  # type: ignore[arg-type]
        max_steps=steps,
        max_epochs=-1,
        logger=[
            EpochlessTensorBoardLogger(**logger_args, default_hp_metric=False),
            CSVLogger(**logger_args, flush_logs_every_n_steps=1),
        ],
        callbacks=[
            *callbacks,
            stop_callback,
            checkpoint_callback,
            *([StepProgressBar()] if trainer_config.progress_bar else []),
        ],
        enable_progress_bar=trainer_config.progress_bar,
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
