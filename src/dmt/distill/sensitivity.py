"""How much a model's answer moves when the output of a feed-forward block does: what slots are worth, in nats."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dmt.distill.signals import observe
from dmt.models.architectures import architecture_of


def measure_sensitivity(model: PreTrainedModel, windows: Tensor, batch: int = 4) -> Tensor:
    """Fisher information of each block's output, `(layers, width, width)`, over token ids `(windows, time)`.

    A small change d of one block's output at one token moves the model's distributions, of that token and those after
    it, by a KL of about `d F d / 2` nats in all. Sampled: next tokens are drawn from the model itself, and F is the mean
    outer product of the gradient of their log-probability.

    Source: Amari 1998, section 4 (the metric); Kunstner et al. 2019, arXiv 1905.12558 (why to draw, not take the text's own).
    """
    arch = architecture_of(model.config.model_type)
    total, tokens = torch.zeros(()), 0
    generator = torch.Generator().manual_seed(0)
    for part in windows.split(batch):
        nudges: list[Tensor] = []

        def nudge(_: nn.Module, __: tuple[Tensor, ...], answered: Tensor, nudges: list[Tensor] = nudges) -> Tensor:
            nudges.append(torch.zeros_like(answered, requires_grad=True))
            return answered + nudges[-1]

        hooks = [block.register_forward_hook(nudge) for block in arch.blocks(model)]
        try:
            with torch.enable_grad():
                logits = observe(model, part).logits.flatten(0, 1).float()
                # Drawn on the CPU, so that a seed means the same on every device.
                drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).to(logits.device)
                gradients = torch.autograd.grad(F.cross_entropy(logits, drawn.flatten(), reduction="sum"), nudges)
        finally:
            for hook in hooks:
                hook.remove()
        flat = torch.stack([gradient.flatten(0, -2).float() for gradient in gradients])
        total, tokens = total.to(flat) + flat.transpose(1, 2) @ flat, tokens + part.numel()
    return total / tokens


def root(metric: Tensor) -> Tensor:
    """R with R Rᵀ = `metric`, a symmetric matrix without negative eigenvalues but for rounding: |xR|² is x metric x."""
    eigenvalues, vectors = torch.linalg.eigh(metric.cpu().double())  # not every device has doubles
    return (vectors * eigenvalues.clamp(min=0).sqrt()).to(metric)
