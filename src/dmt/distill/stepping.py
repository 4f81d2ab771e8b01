"""What every LightningModule here shares about a step: its rate, AdamW, gradients of pieces and of processes."""

from __future__ import annotations

import math
from collections.abc import Container
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from dmt.config import OptimConfig
from dmt.memory.together import several


def gradients_apart(module: pl.LightningModule, until: bool) -> AbstractContextManager[None]:
    """Within, gradients stay with each of several processes, `until` it is a step's last piece: then they are averaged."""
    if until or not several():
        return nullcontext()
    strategy = module.trainer.strategy
    assert isinstance(strategy, DDPStrategy), "several processes train by DDP alone"
    return strategy.block_backward_sync()


def learning_rate(step: int, length: int, peak: float, optim: OptimConfig) -> float:
    """Linear warm-up to `peak`, then a cosine down to `final_lr` of it at the last step of the stage."""
    warmup = min(optim.warmup, length // 2)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, length - 1 - warmup)
    return peak * (optim.final_lr + (1 - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def widening(step: int, length: int, start: float) -> float:
    """Slots read as a multiple of k: from `start` down to 1 at the middle of the stage, by equal factors a step."""
    return start ** max(0.0, 1 - 2 * step / max(1, length))


def adamw(parameters: Any, optim: OptimConfig, values: Container[int] = ()) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only; tensors whose `id` is in `values` have `values_lr` times the rate."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for parameter in parameters:
        share = optim.values_lr if id(parameter) in values else 1.0
        groups.setdefault((optim.weight_decay if parameter.dim() > 1 else 0.0, share), []).append(parameter)
    described = [{"params": members, "weight_decay": decay, "share": share} for (decay, share), members in groups.items()]
    return torch.optim.AdamW(described, lr=0.0, betas=(optim.beta1, optim.beta2))
