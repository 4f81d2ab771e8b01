"""Checkpoints of a run: written atomically, verified when read."""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint

from dmt.errors import UserError
from dmt.files import CHECKPOINT_VERSION, atomic_path, check_version
from dmt.paths import quote_path
from dmt.training.optimization import NonFiniteError
from dmt.training.run_dir import format_distill_command, list_checkpoints, newest_checkpoint

logger = logging.getLogger(__name__)

DAMAGED_SUFFIX = ".corrupt"  # appended to the name of a checkpoint that cannot be read
REQUIRED_KEYS = ("global_step", "state_dict", "optimizer_states")  # without them no resume


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its final path, on the same disk, and move it there when done."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Save a checkpoint; Lightning's own copies it from the system's temporary folder."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as partial_path, partial_path.open("wb") as file:
            torch.save(checkpoint, file)


class StepBoundaryCheckpoint(ModelCheckpoint):
    """Save on an exception too, but only between steps: half a step cannot be resumed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_step = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, *batch: Any
    ) -> None:
        """Note that a step has begun."""
        self._in_step = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any
    ) -> None:  # type: ignore[override]
        """Note that the step is complete, and save if it is due."""
        self._in_step = False
        super().on_train_batch_end(trainer, pl_module, *batch)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Save unless the exception came in the middle of a step."""
        if trainer.world_size > 1:
            return  # saving takes all processes, and the others may be gone
        if not self._in_step and not isinstance(exception, NonFiniteError):
            super().on_exception(trainer, pl_module, exception)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the format version, and refuse to save weights that are not finite.

        Raises:
            NonFiniteError: A step with a finite gradient has made weights non-finite.
        """
        checkpoint["dmt"] = CHECKPOINT_VERSION
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad and not bool(parameter.isfinite().all()):
                raise NonFiniteError(
                    trainer.global_step, f"{name.removeprefix('student.')} after it"
                )


def is_intact(path: Path) -> bool:
    """Return whether a checkpoint is readable: checksums match and it holds tensors only."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not verify the checksums
            if archive.testzip() is not None:
                return False
        checkpoint = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        return isinstance(checkpoint, dict) and all(name in checkpoint for name in REQUIRED_KEYS)
    except MemoryError:
        raise
    except Exception:  # damaged bytes may fail in any way
        return False


def set_aside_damaged_checkpoints(run_dir: Path) -> None:
    """Rename damaged checkpoints that are newer than the newest intact one, with a warning.

    Raises:
        UserError: No checkpoint is intact, or the newest intact one is of another version.
    """
    damaged: list[str] = []
    for path in reversed(list_checkpoints(run_dir)):
        if is_intact(path):
            break
        damaged_path = path.with_name(path.name + DAMAGED_SUFFIX)
        while damaged_path.exists():
            damaged_path = damaged_path.with_name(damaged_path.name + DAMAGED_SUFFIX)
        path.rename(damaged_path)
        damaged.append(f"{path.name} (kept as {damaged_path.name})")
    newest = newest_checkpoint(run_dir)
    restart_command = format_distill_command(quote_path(run_dir / "config.yaml"))
    checkpoint_dir = run_dir / "checkpoints"
    if damaged and newest is None:
        raise UserError(
            f"--resume {run_dir}: every checkpoint in {checkpoint_dir} is damaged:"
            f" {', '.join(damaged)}; restore a copy, or start again: {restart_command}"
        )
    if newest is None:
        return
    if damaged:
        logger.warning(
            "damaged in %s: %s; resuming from %s", checkpoint_dir, ", ".join(damaged), newest.name
        )
    # A mapped load reads no tensor yet.
    checkpoint = torch.load(newest, weights_only=True, map_location="cpu", mmap=True)
    check_version(
        checkpoint.get("dmt", 1),
        CHECKPOINT_VERSION,
        f"{newest}: version",
        f"start again: {restart_command}, or resume with the dmt that made it",
    )
