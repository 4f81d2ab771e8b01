"""Layer norms whose gradients do not depend on how many threads compute them.

torch 2.13 adds up the gradients of a LayerNorm's weight and bias on a CPU by thread: so many partial sums as there are
threads. Of everything that a GPT-2 and its memories compute nothing else does, with 1, 2, 4, 8 or 16 threads (EXPERIMENTS.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SteadyLayerNorm(nn.LayerNorm):
    """A LayerNorm with the same values, whose weight's and bias's gradients are summed over all rows at once on a CPU."""

    def forward(self, given: Tensor) -> Tensor:
        if self.weight is None or given.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(given)
        normed: Tensor = _Steady.apply(given, self.weight, self.bias, self.eps)
        return normed


def use_norms(model: nn.Module, steady: bool) -> None:
    """Let every LayerNorm of `model` be a `SteadyLayerNorm`, or be torch's own again; its tensors stay where they are."""
    before, after = (nn.LayerNorm, SteadyLayerNorm) if steady else (SteadyLayerNorm, nn.LayerNorm)
    for module in model.modules():
        if type(module) is before:
            module.__class__ = after


class _Steady(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        normed, mean, rstd = torch.native_layer_norm(given, weight.shape, weight, bias, eps)
        ctx.save_for_backward(given, weight, bias, mean, rstd)
        return normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        given, weight, bias, mean, rstd = ctx.saved_tensors
        (of_normed,), needed = gradients, ctx.needs_input_grad
        of_given = of_weight = of_bias = None
        if needed[0]:
            of_given = torch.ops.aten.native_layer_norm_backward(
                of_normed, given, weight.shape, mean, rstd, weight, bias, [True, False, False]
            )[0]
        if needed[1]:
            of_weight = (of_normed * ((given - mean) * rstd)).sum_to_size(weight.shape).to(weight.dtype)
        if needed[2]:
            of_bias = of_normed.to(mean.dtype).sum_to_size(weight.shape).to(weight.dtype)
        return of_given, of_weight, of_bias, None
