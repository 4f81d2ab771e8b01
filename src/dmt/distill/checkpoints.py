"""Checkpoints of a run: written whole, when a step is whole; those that a disk has damaged are put aside and not gone on from."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint

from dmt.disk import sync
from dmt.distill.finite import NotFinite
from dmt.distill.folder import checkpoints, newest_checkpoint
from dmt.errors import UserError
from dmt.versions import CHECKPOINT, check_version

DAMAGED = ".damaged"
"""What is added to the name of a checkpoint that cannot be read."""
NEEDED = ("global_step", "state_dict", "optimizer_states")
"""Without which there is nothing to go on from."""


class WholeFiles(TorchCheckpointIO):
    """Checkpoints written beside their place, on the same disk, and put there once all of them is on it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """As Lightning's, which writes to the system's temporary folder first and copies from there."""
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f"{place.name}.partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(place)
            sync(place.parent)
        finally:
            partial.unlink(missing_ok=True)


class Saver(ModelCheckpoint):
    """Saves when something has failed too, unless in the middle of a step: half of one is nothing to go on from."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._amid = False

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *batch: Any) -> None:
        self._amid = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:  # type: ignore[override]
        self._amid = False
        super().on_train_batch_end(trainer, pl_module, *batch)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.world_size > 1:
            return  # saving takes all processes, and this one cannot know what became of the others
        if not self._amid and not isinstance(exception, NotFinite):
            super().on_exception(trainer, pl_module, exception)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Give it a version, and refuse, whoever saves, weights that nothing can be learnt from any more.

        Raises:
            NotFinite: a step has made them so, with a gradient that was finite.
        """
        checkpoint["dmt"] = CHECKPOINT
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad and not bool(parameter.isfinite().all()):
                raise NotFinite(trainer.global_step, f"{name.removeprefix('student.')} after it")


def whole(file: Path) -> bool:
    """Whether a checkpoint can be gone on from: every byte is as it was written, and there is nothing in it but tensors."""
    try:
        with zipfile.ZipFile(file) as parts:  # torch does not look at the checksums of what it reads
            if parts.testzip() is not None:
                return False
        found = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
        return isinstance(found, dict) and all(name in found for name in NEEDED)
    except MemoryError:
        raise
    except Exception:  # whatever bytes may be taken for
        return False


def check_checkpoints(run: Path) -> None:
    """Leave the newest whole checkpoint of a run as its newest; say so where others were newer, which are put aside.

    Raises:
        UserError: there were checkpoints, and none of them is whole, or the newest of these is of another version.
    """
    there = checkpoints(run)
    damaged: list[str] = []
    for file in reversed(there):
        if whole(file):
            break
        aside = file.with_name(file.name + DAMAGED)
        while aside.exists():
            aside = aside.with_name(aside.name + DAMAGED)
        file.rename(aside)
        damaged.append(f"{file.name} (kept as {aside.name})")
    if damaged:
        _tell(run, damaged)
    if (newest := newest_checkpoint(run)) is None:
        return
    found = torch.load(newest, weights_only=True, map_location="cpu", mmap=True)  # which reads no tensor yet
    anew = f"start anew: python distill.py {run}/config.yaml, or go on with the dmt that made it"
    check_version(found.get("dmt", 1), CHECKPOINT, f"{newest}: version", anew)


def _tell(run: Path, damaged: list[str]) -> None:
    listed = ", ".join(damaged)
    if (newest := newest_checkpoint(run)) is None:
        raise UserError(
            f"--resume {run}: every checkpoint in {run / 'checkpoints'} is damaged: {listed}; put a copy back, or start anew: "
            f"python distill.py {run}/config.yaml"
        )
    print(f"damaged in {run / 'checkpoints'}: {listed}; going on from {newest.name} before", file=sys.stderr)
