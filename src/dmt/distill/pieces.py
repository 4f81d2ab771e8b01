"""Losses over a vocabulary in pieces: one piece's logits exist at a time, and their gradient is known without a graph.

A student's and a teacher's logits for 2,048 tokens of 50,000 words are a hundred million numbers each, and an automatic
gradient keeps several such. Here each piece's gradient goes through the head at once and only what it leaves on hidden
states and the head's weights is kept.

Source: the idea of Liger Kernel's fused linear losses (Hsu et al. 2024, arXiv 2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Slopes = Callable[[Tensor, slice], Iterator[tuple[Tensor, Tensor]]]
"""For a piece's logits and its place: each term, a scalar, and its gradient in the logits."""


def kl_slope(given: Tensor, wanted: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """KL(wanted || given) per token, as `losses.kl`, and its gradient in `given`; logits `(tokens, vocabulary)`."""
    mine, p, norm = _softmax(given, temperature)
    theirs, q, wanted_norm = _softmax(wanted, temperature)
    value = torch.linalg.vecdot(q, theirs.sub_(mine)) + norm - wanted_norm
    return value * temperature**2, p.sub_(q).mul_(temperature)


def reverse_kl_slope(given: Tensor, wanted: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """KL(given || wanted) per token, as `losses.reverse_kl`, and its gradient in `given`."""
    mine, p, norm = _softmax(given, temperature)
    theirs, _, wanted_norm = _softmax(wanted, temperature)
    apart = mine.sub_(theirs)
    value = torch.linalg.vecdot(p, apart)
    slope = apart.sub_(value.unsqueeze(-1)).mul_(p).mul_(temperature)
    return (value - norm + wanted_norm) * temperature**2, slope


def ce_slope(given: Tensor, wanted: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `targets` `(tokens,)` per token and its gradient in `given`; knows no teacher, no temperature."""
    mine, p, norm = _softmax(given, 1.0)
    at = targets.unsqueeze(-1)
    return norm - mine.gather(-1, at).squeeze(-1), p.scatter_add_(-1, at, torch.full_like(at, -1, dtype=p.dtype))


SLOPES: dict[str, Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "kl": kl_slope,
    "reverse_kl": reverse_kl_slope,
    "ce": ce_slope,
}
"""Value and gradient of each term that is about logits, by the term's name."""


def in_pieces(head: nn.Module, slopes: Slopes, pieces: list[slice], terms: int, hidden: Tensor) -> Tensor:
    """Terms, summed over pieces of `hidden` `(tokens, width)`, as one tensor `(terms,)` that gradients flow through."""
    learnt = [parameter for parameter in head.parameters() if parameter.requires_grad]
    total: Tensor = _InPieces.apply(head, slopes, pieces, terms, hidden, *learnt)
    return total


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, head: nn.Module, slopes: Slopes, pieces: list[slice], terms: int, hidden: Tensor, *learnt: Tensor
    ) -> Tensor:
        kept = [hidden.new_zeros(terms, *hidden.shape), *(weight.new_zeros(terms, *weight.shape) for weight in learnt)]
        total = torch.zeros(terms, device=hidden.device)
        for piece in pieces:
            with torch.enable_grad():
                part = hidden[piece].detach().requires_grad_()
                logits = head(part)
            for term, (value, slope) in enumerate(slopes(logits.detach(), piece)):
                total[term] += value
                mine, *others = torch.autograd.grad(logits, [part, *learnt], slope.to(logits.dtype), retain_graph=term < terms - 1)
                kept[0][term, piece] = mine
                for sum_, more in zip(kept[1:], others, strict=True):
                    sum_[term] += more
        ctx.save_for_backward(*kept)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        found = [torch.tensordot(upstream[0].to(kept.dtype), kept, dims=1) for kept in ctx.saved_tensors]
        return None, None, None, None, *found


def _softmax(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits over the temperature, in a float32 of their own, their probabilities, and the log of what these sum to."""
    scaled = logits.to(torch.float32, copy=True)
    if temperature != 1:
        scaled /= temperature
    probabilities = torch.softmax(scaled, dim=-1)
    best = scaled.max(-1, keepdim=True)
    return scaled, probabilities, (best.values - probabilities.gather(-1, best.indices).log()).squeeze(-1)
