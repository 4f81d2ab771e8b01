"""Checkpoints of a run: written whole, when a step is whole; those that a disk has damaged are put aside and not gone on from.

Numbers that are not finite: noticed in every step before it changes anything; where they came from, sought once they did.
"""

from __future__ import annotations

import os
import re
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from transformers import PreTrainedModel

from dmt.distributed import all_reduce_mean
from dmt.errors import UserError
from dmt.files import CHECKPOINT_VERSION, check_version, fsync_path
from dmt.models.architectures import get_architecture
from dmt.models.forward import capture
from dmt.training.run_dir import list_checkpoints, newest_checkpoint


class NonFiniteError(Exception):
    """A step met numbers that are not finite; nothing of it has been kept.

    Args:
        step: number of the step, counted from 1 as checkpoints are.
        where: what is not finite.
    """

    def __init__(self, step: int, location: str) -> None:
        super().__init__(f"step {step}: {location} is not finite")
        self.step, self.location = step, location


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """The norm of all gradients `()`, which are scaled down to `most` where that is not 0 and they are longer, as torch does it."""
    parameters = [
        p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    # Scaled by a norm that is not finite all of them would be so, and nobody could tell whose gradient it was.
    if max_norm and bool(norm.isfinite()):
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def check_finite(
    step: int,
    loss: Tensor,
    grad_norm: Tensor,
    model: PreTrainedModel,
    recompute_losses: Callable[[], Any],
) -> None:
    """Raise `NotFinite` where a step's loss or the norm of its gradients is not finite.

    Args:
        loss, norm: `()`; of several processes each has a loss of its own, and all notice where one of them is not finite.
        model: learns.
        again: computes the step's losses once more, without gradients.
    """
    if bool(torch.isfinite(all_reduce_mean(loss.detach() + grad_norm))):
        return
    location = (
        _find_nonfinite_output(model, recompute_losses)
        or (None if bool(loss.isfinite()) else "the loss")
        or _find_nonfinite_gradient(model)
        or "a gradient"
    )
    raise NonFiniteError(step, location)


@torch.no_grad()
def _find_nonfinite_output(
    model: PreTrainedModel, recompute_losses: Callable[[], Any]
) -> str | None:
    """The first thing in the order of computing whose output is not finite."""
    arch, nonfinite_names = get_architecture(model.config.model_type), list[str]()

    def check_output(name: str, output: Tensor) -> None:
        if not bool(output.isfinite().all()):
            nonfinite_names.append(name)

    modules: dict[str, nn.Module] = {
        "the output of the embeddings": model.get_input_embeddings(),
        "the output of the last linear map": model.get_output_embeddings(),
    }
    for layer, (block, layer_module) in enumerate(
        zip(arch.blocks(model), arch.transformer_blocks(model), strict=True)
    ):
        modules[f"the output of layer {layer}'s block"] = block
        modules[f"the output of layer {layer}"] = layer_module
    # Values that are not finite may make any later operation fail; outputs up to there are checked.
    with capture(modules, on_output=check_output), suppress(Exception):
        recompute_losses()
    return next(iter(nonfinite_names), None)


def _find_nonfinite_gradient(model: PreTrainedModel) -> str | None:
    """The weight of the highest layer whose gradient is not finite: they are computed from the top down."""
    names = [
        name
        for name, p in model.named_parameters()
        if p.grad is not None and not bool(p.grad.isfinite().all())
    ]
    if not names:
        return None
    path = get_architecture(model.config.model_type).layers
    layers_and_names = [
        (int(match[1]), name)
        for name in names
        if (match := re.match(rf"{re.escape(path)}\.(\d+)\.", name))
    ]
    if not layers_and_names:
        return f"the gradient of {names[0]}"
    layer, name = max(layers_and_names, key=lambda pair: pair[0])
    return f"the gradient of layer {layer} ({name})"


DAMAGED_SUFFIX = ".damaged"
"""What is added to the name of a checkpoint that cannot be read."""
REQUIRED_KEYS = ("global_step", "state_dict", "optimizer_states")
"""Without which there is nothing to go on from."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints written beside their place, on the same disk, and put there once all of them is on it."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """As Lightning's, which writes to the system's temporary folder first and copies from there."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial_path = target.with_name(f"{target.name}.partial")
        try:
            with partial_path.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial_path.replace(target)
            fsync_path(target.parent)
        finally:
            partial_path.unlink(missing_ok=True)


class StepBoundaryCheckpoint(ModelCheckpoint):
    """Saves when something has failed too, unless in the middle of a step: half of one is nothing to go on from."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_step = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, *batch: Any
    ) -> None:
        self._in_step = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any
    ) -> None:  # type: ignore[override]
        self._in_step = False
        super().on_train_batch_end(trainer, pl_module, *batch)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if trainer.world_size > 1:
            return  # saving takes all processes, and this one cannot know what became of the others
        if not self._in_step and not isinstance(exception, NonFiniteError):
            super().on_exception(trainer, pl_module, exception)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Give it a version, and refuse, whoever saves, weights that nothing can be learnt from any more.

        Raises:
            NotFinite: a step has made them so, with a gradient that was finite.
        """
        checkpoint["dmt"] = CHECKPOINT_VERSION
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad and not bool(parameter.isfinite().all()):
                raise NonFiniteError(
                    trainer.global_step, f"{name.removeprefix('student.')} after it"
                )


def is_intact(path: Path) -> bool:
    """Whether a checkpoint can be gone on from: every byte is as it was written, and there is nothing in it but tensors."""
    try:
        with zipfile.ZipFile(
            path
        ) as archive:  # torch does not look at the checksums of what it reads
            if archive.testzip() is not None:
                return False
        checkpoint = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        return isinstance(checkpoint, dict) and all(name in checkpoint for name in REQUIRED_KEYS)
    except MemoryError:
        raise
    except Exception:  # whatever bytes may be taken for
        return False


def set_aside_damaged_checkpoints(run_dir: Path) -> None:
    """Leave the newest whole checkpoint of a run as its newest; say so where others were newer, which are put aside.

    Raises:
        UserError: there were checkpoints, and none of them is whole, or the newest of these is of another version.
    """
    paths = list_checkpoints(run_dir)
    damaged: list[str] = []
    for path in reversed(paths):
        if is_intact(path):
            break
        damaged_path = path.with_name(path.name + DAMAGED_SUFFIX)
        while damaged_path.exists():
            damaged_path = damaged_path.with_name(damaged_path.name + DAMAGED_SUFFIX)
        path.rename(damaged_path)
        damaged.append(f"{path.name} (kept as {damaged_path.name})")
    if damaged:
        _report_damaged(run_dir, damaged)
    if (newest := newest_checkpoint(run_dir)) is None:
        return
    checkpoint = torch.load(
        newest, weights_only=True, map_location="cpu", mmap=True
    )  # which reads no tensor yet
    restart_advice = (
        f"start anew: python distill.py {run_dir}/config.yaml, or go on with the dmt that made it"
    )
    check_version(
        checkpoint.get("dmt", 1), CHECKPOINT_VERSION, f"{newest}: version", restart_advice
    )


def _report_damaged(run_dir: Path, damaged: list[str]) -> None:
    damaged_list = ", ".join(damaged)
    if (newest := newest_checkpoint(run_dir)) is None:
        raise UserError(
            f"--resume {run_dir}: every checkpoint in {run_dir / 'checkpoints'} is damaged: {damaged_list}; put a copy back, or start anew: "
            f"python distill.py {run_dir}/config.yaml"
        )
    print(
        f"damaged in {run_dir / 'checkpoints'}: {damaged_list}; going on from {newest.name} before",
        file=sys.stderr,
    )
