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

from dmt.distill.sampling import Sampled, closeness
from dmt.memory.products import QuickLinear, linear

Slopes = Callable[[Tensor, slice], Iterator[tuple[Tensor, Tensor]]]
"""For a piece's logits, which it may overwrite, and its place: each term, a scalar, and its gradient in the logits."""


def kl_slope(given: Tensor, wanted: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """KL(wanted || given) per token, as `losses.kl`, and its gradient in `given`; logits `(tokens, vocabulary)`, overwritten."""
    given, wanted = _scaled(given, temperature), _scaled(wanted, temperature)
    q, wanted_norm = _softmax(wanted)
    value = torch.linalg.vecdot(q, wanted.sub_(given))
    p, norm = _softmax(given, given)
    return (value + norm - wanted_norm) * temperature**2, _times(p.sub_(q), temperature)


def reverse_kl_slope(given: Tensor, wanted: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """KL(given || wanted) per token, as `losses.reverse_kl`, and its gradient in `given`; logits are overwritten."""
    given, wanted = _scaled(given, temperature), _scaled(wanted, temperature)
    p, norm = _softmax(given)
    apart = given.sub_(wanted)
    _, wanted_norm = _softmax(wanted, wanted)
    value = torch.linalg.vecdot(p, apart)
    slope = _times(apart.sub_(value.unsqueeze(-1)).mul_(p), temperature)
    return (value - norm + wanted_norm) * temperature**2, slope


def ce_slope(given: Tensor, wanted: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `targets` `(tokens,)` per token and its gradient in `given`; knows no teacher, no temperature."""
    given, at = _scaled(given, 1.0), targets.unsqueeze(-1)
    said = given.gather(-1, at).squeeze(-1)
    p, norm = _softmax(given, given)
    return norm - said, p.scatter_add_(-1, at, torch.full_like(at, -1, dtype=p.dtype))


def sampled_kl_slope(given: Tensor, wanted: Sampled, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`sampled_kl` per token and its gradient in `given` `(tokens, vocabulary)`, which is overwritten."""
    given = _scaled(given, temperature)
    logs = given.gather(-1, wanted.ids)
    p, norm = _softmax(given, given)
    logs -= norm.unsqueeze(-1)
    weights, trust = wanted.weights, closeness(wanted, logs).unsqueeze(-1)
    expected = trust * (weights / wanted.logs.exp() * logs.exp())
    value = (weights * (wanted.logs - logs) + expected).sum(-1) - trust.squeeze(-1)
    slope = p.mul_((weights - expected).sum(-1, keepdim=True)).scatter_add_(-1, wanted.ids, expected - weights)
    return value * temperature**2, _times(slope, temperature)


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
        product = _is_product(head, hidden)
        for piece in pieces:
            with torch.set_grad_enabled(not product):
                part = hidden[piece].detach().requires_grad_(not product)
                logits = head(part)
            for term, (value, slope) in enumerate(slopes(logits.detach(), piece)):
                total[term] += value
                if product:  # added up in place: a gradient of the whole head for each piece would be as large as the head
                    kept[0][term, piece] = linear(slope, head.weight.t())  # type: ignore[assignment]
                    for sum_ in kept[1:]:
                        sum_[term].addmm_(slope.t(), part)
                    continue
                mine, *others = torch.autograd.grad(logits, [part, *learnt], slope.to(logits.dtype), retain_graph=term < terms - 1)
                kept[0][term, piece] = mine
                for sum_, more in zip(kept[1:], others, strict=True):
                    sum_[term] += more
        ctx.save_for_backward(*kept)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if upstream[0].numel() == 1:
            by = upstream[0].item()  # one, as a rule, and then there is nothing to do for millions of numbers
            found = [kept[0] if by == 1 else kept[0] * by for kept in ctx.saved_tensors]
        else:
            found = [torch.tensordot(upstream[0].to(kept.dtype), kept, dims=1) for kept in ctx.saved_tensors]
        return None, None, None, None, *found


def _is_product(head: nn.Module, hidden: Tensor) -> bool:
    """Whether a head is a product with its weight and no more, so that its gradient can be written down."""
    hooked = head._forward_hooks or head._forward_pre_hooks
    half = torch.is_autocast_enabled(hidden.device.type)
    return (
        type(head) in (nn.Linear, QuickLinear)
        and head.bias is None
        and not hooked
        and not half
        and head.weight.dtype == hidden.dtype == torch.float32
    )


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """Logits over the temperature in float32, in the same memory where they are that already."""
    logits = logits.float()
    return logits if temperature == 1 else logits.div_(temperature)


def _times(slope: Tensor, temperature: float) -> Tensor:
    return slope if temperature == 1 else slope.mul_(temperature)


def _softmax(logits: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Probabilities, in `out` where that is given, and the log of what `logits` sum to as exponents, per token."""
    best = logits.max(-1, keepdim=True)
    largest = best.values.clone()
    probabilities = torch.softmax(logits, dim=-1) if out is None else torch.softmax(logits, dim=-1, out=out)
    return probabilities, (largest - probabilities.gather(-1, best.indices).log()).squeeze(-1)
