"""Numbers that are not finite: noticed in every step before it changes anything; where they came from, sought once they did."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dmt.memory.together import averaged
from dmt.models.architectures import architecture_of


class NotFinite(Exception):
    """A step met numbers that are not finite; nothing of it has been kept.

    Args:
        step: number of the step, counted from 1 as checkpoints are.
        where: what is not finite.
    """

    def __init__(self, step: int, where: str) -> None:
        super().__init__(f"step {step}: {where} is not finite")
        self.step, self.where = step, where


def clipped(optimizer: torch.optim.Optimizer, most: float) -> Tensor:
    """The norm of all gradients `()`, which are scaled down to `most` where that is not 0 and they are longer, as torch does it."""
    learnt = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in learnt])
    # Scaled by a norm that is not finite all of them would be so, and nobody could tell whose gradient it was.
    if most and bool(norm.isfinite()):
        torch.nn.utils.clip_grads_with_norm_(learnt, most, norm)
    return norm


def check_finite(step: int, loss: Tensor, norm: Tensor, model: PreTrainedModel, again: Callable[[], Any]) -> None:
    """Raise `NotFinite` where a step's loss or the norm of its gradients is not finite.

    Args:
        loss, norm: `()`; of several processes each has a loss of its own, and all notice where one of them is not finite.
        model: learns.
        again: computes the step's losses once more, without gradients.
    """
    if bool(torch.isfinite(averaged(loss.detach() + norm))):
        return
    where = _first_output(model, again) or (None if bool(loss.isfinite()) else "the loss") or _first_gradient(model) or "a gradient"
    raise NotFinite(step, where)


@torch.no_grad()
def _first_output(model: PreTrainedModel, again: Callable[[], Any]) -> str | None:
    """The first thing in the order of computing whose output is not finite."""
    arch, found, hooks = architecture_of(model.config.model_type), list[str](), []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(_: nn.Module, given: Any, said: Any) -> None:
            first = said[0] if isinstance(said, tuple) else said
            if isinstance(first, Tensor) and not bool(first.isfinite().all()):
                found.append(name)

        return note

    for layer, (block, whole) in enumerate(zip(arch.blocks(model), arch.whole_layers(model), strict=True)):
        hooks.append(block.register_forward_hook(look(f"the output of layer {layer}'s block")))
        hooks.append(whole.register_forward_hook(look(f"the output of layer {layer}")))
    hooks.append(model.get_input_embeddings().register_forward_hook(look("the output of the embeddings")))
    hooks.append(model.get_output_embeddings().register_forward_hook(look("the output of the last linear map")))
    try:
        with suppress(Exception):  # what is not finite may fail in many a way; what was found before is found
            again()
    finally:
        for hook in hooks:
            hook.remove()
    return next(iter(found), None)


def _first_gradient(model: PreTrainedModel) -> str | None:
    """The weight of the highest layer whose gradient is not finite: they are computed from the top down."""
    names = [name for name, p in model.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
    if not names:
        return None
    path = architecture_of(model.config.model_type).layers
    placed = [(int(found[1]), name) for name in names if (found := re.match(rf"{re.escape(path)}\.(\d+)\.", name))]
    if not placed:
        return f"the gradient of {names[0]}"
    layer, name = max(placed, key=lambda each: each[0])
    return f"the gradient of layer {layer} ({name})"
