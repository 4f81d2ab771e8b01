"""What every training step shares: learning rates, AdamW, clipping, the check for finite numbers.

Each step is checked before it changes anything; the cause is searched only once a step fails.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from transformers import PreTrainedModel

from dmt.config import OptimConfig
from dmt.distributed import all_reduce_mean, is_distributed
from dmt.models.architectures import get_architecture
from dmt.models.forward import capture


class NonFiniteError(Exception):
    """A step met numbers that are not finite; it has changed nothing.

    Args:
        step: Number of the step, counted from 1 as checkpoints are.
        location: What is not finite.
    """

    def __init__(self, step: int, location: str) -> None:
        super().__init__(f"step {step}: {location} is not finite")
        self.step, self.location = step, location


def cosine_decay(progress: float, min_ratio: float) -> float:
    """Return the factor of a cosine from 1 at progress 0 down to `min_ratio` at progress 1."""
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def lr_schedule(step: int, total_steps: int, peak_lr: float, optim: OptimConfig) -> float:
    """Return the learning rate of a step: linear warm-up to `peak_lr`, then a cosine.

    Args:
        step: Step of the stage, counted from 0.
        total_steps: Steps of the stage; the last one has `optim.min_lr_ratio` of `peak_lr`.
        peak_lr: The highest rate.
        optim: Warm-up and final ratio.
    """
    warmup = min(optim.warmup_steps, total_steps // 2)
    if step < warmup:
        return peak_lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    return peak_lr * cosine_decay(min(1.0, progress), optim.min_lr_ratio)


def k_schedule(step: int, total_steps: int, start_factor: float) -> float:
    """Return the multiple of k to read: from `start_factor` down to 1 at the middle of the stage.

    It falls by the same factor in each step.
    """
    return start_factor ** max(0.0, 1 - 2 * step / max(1, total_steps))


def build_adamw(
    parameters: Any,
    optim: OptimConfig,
    value_ids: Container[int] = (),
    table_ids: Container[int] = (),
) -> torch.optim.AdamW:
    """Build AdamW with weight decay on matrices only.

    Args:
        parameters: What to train.
        optim: Betas, weight decay and `value_lr_scale`.
        value_ids: `id` of each parameter whose learning rate is scaled by `value_lr_scale`.
        table_ids: `id` of each large table. On a CPU one pass over memory updates it, which takes
            a ninth of the time and rounds in another order.
    """
    groups: dict[tuple[float, float, bool], list[Tensor]] = {}
    for parameter in parameters:
        lr_scale = optim.value_lr_scale if id(parameter) in value_ids else 1.0
        weight_decay = optim.weight_decay if parameter.dim() > 1 else 0.0
        is_fused = id(parameter) in table_ids and parameter.device.type == "cpu"
        groups.setdefault((weight_decay, lr_scale, is_fused), []).append(parameter)
    param_groups = [
        {"params": params, "weight_decay": weight_decay, "lr_scale": lr_scale}
        | ({"fused": True} if is_fused else {})
        for (weight_decay, lr_scale, is_fused), params in groups.items()
    ]
    return torch.optim.AdamW(param_groups, lr=0.0, betas=(optim.beta1, optim.beta2))


def no_sync(module: pl.LightningModule, is_last: bool) -> AbstractContextManager[None]:
    """Do not average gradients over processes within this, except in a step's last micro-batch.

    Args:
        module: The module that trains.
        is_last: Whether this is the last micro-batch of the step.
    """
    if is_last or not is_distributed():
        return nullcontext()
    strategy = module.trainer.strategy
    assert isinstance(strategy, DDPStrategy), "several processes train by DDP alone"
    return strategy.block_backward_sync()


def measure_gradients(optimizer: torch.optim.Optimizer) -> Tensor:
    """Return the norm of all gradients of an optimizer's parameters, `()`."""
    gradients = [p.grad for p in _list_trained(optimizer) if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float, norm: Tensor) -> None:
    """Scale gradients down to `max_norm` if they are longer, as torch does.

    Args:
        optimizer: Holds the parameters.
        max_norm: 0 for no clipping.
        norm: Norm of all gradients `()`, which has to be finite: any other would spoil all of them
            and hide the one that caused it.
    """
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(_list_trained(optimizer), max_norm, norm)


def _list_trained(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def check_finite(
    step: int,
    loss: Tensor,
    grad_norm: Tensor,
    model: PreTrainedModel,
    recompute_losses: Callable[[], Any],
) -> None:
    """Raise `NonFiniteError` if a step's loss or gradient norm is not finite, in all processes.

    Args:
        step: Number of the step, counted from 1.
        loss: This process's loss, `()`.
        grad_norm: Norm of the gradients, `()`.
        model: The model that is trained.
        recompute_losses: Computes the step's losses again, without gradients.
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
    """Return the first module in the order of computation whose output is not finite."""
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
    """Return the highest layer's parameter with a non-finite gradient: backward starts there."""
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
