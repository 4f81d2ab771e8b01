"""Losses between a student's signals and a teacher's: masked, per token, independent of how a batch is split.

Every term is a sum over valid tokens divided by a count that the caller gives, the number of valid tokens of the whole
batch. So the gradient is the same however many pieces the batch is computed in. Each term's name is its weight's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmt.config import LossConfig
from dmt.distill.outliers import share
from dmt.distill.pieces import SLOPES, in_pieces, sampled_kl_slope
from dmt.distill.sampling import Sampled, sampled_kl
from dmt.distill.signals import Signals


@dataclass(frozen=True)
class Scales:
    """Variances that turn squared errors into fractions: summed over the width, one per layer and one for the last hidden.

    Fixed before training: the variance of a batch would make the loss depend on how a batch is split.
    """

    blocks: Tensor  # (layers,)
    hidden: Tensor  # ()
    limits: Tensor | None = None  # (layers,): length beyond which a block's output counts less, see `outliers`


@dataclass(frozen=True)
class Batch:
    """Token ids `(batch, time)`, which of them count (same shape, bool), and how many do in the whole step.

    Attributes:
        tokens_in_step: valid tokens of the step, over all pieces and processes: the divisor of `kl` and the like.
        targets_in_step: valid next tokens of the step: the divisor of `ce`.
    """

    tokens: Tensor
    mask: Tensor
    tokens_in_step: float
    targets_in_step: float

    @staticmethod
    def whole(tokens: Tensor, mask: Tensor | None = None) -> Batch:
        """A batch that is a step of its own."""
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        return Batch(tokens, mask, float(mask.sum()), float(next_token_mask(mask).sum()))


def next_token_mask(mask: Tensor) -> Tensor:
    """Positions whose next token counts: `(batch, time)`, false at the last position."""
    return F.pad(mask[:, :-1] & mask[:, 1:], (0, 1))


def kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) per token in nats, times temperature squared; logits `(..., vocabulary)` to `(...)`.

    Source: Hinton et al. 2015, arXiv 1503.02531, section 2 (the square keeps gradients comparable).
    """
    wanted, given = _log_probabilities(teacher, temperature), _log_probabilities(student, temperature)
    return F.kl_div(given, wanted, reduction="none", log_target=True).sum(-1) * temperature**2


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher) per token in nats, times temperature squared."""
    return kl(teacher, student, temperature)


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(logits.float() / temperature, dim=-1)


def distillation_terms(
    student: Signals,
    teacher: Signals | Sampled,
    batch: Batch,
    weights: LossConfig,
    scales: Scales,
    layers: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """The terms whose weight is not zero, unweighted, each a scalar: nats per token or a fraction of variance.

    Args:
        teacher: what it says now, or its distributions as they were kept, which know of `kl` and `ce` alone.
        layers: whose blocks `block` is about; all where it is left out.
    """
    terms: dict[str, Tensor] = {}
    if weights.kl or weights.reverse_kl or weights.ce:
        terms.update(_token_terms(student, teacher, batch, weights))
    if isinstance(teacher, Sampled):
        return terms
    mask, count = batch.mask, batch.tokens_in_step
    if weights.hidden:
        terms["hidden"] = squared_error(student.hidden, teacher.hidden, mask, count) / scales.hidden
    if weights.cosine:
        closeness = F.cosine_similarity(student.hidden.float(), teacher.hidden.float(), dim=-1)
        terms["cosine"] = ((1 - closeness) * mask).sum() / count
    if weights.block:
        errors = block_errors(student.block_outputs, teacher.block_outputs, mask, count, scales)
        terms["block"] = errors.mean() if layers is None else errors[list(layers)].mean()
    return terms


def weighted_sum(terms: dict[str, Tensor], weights: LossConfig) -> Tensor:
    """The loss: every term times the setting of its name."""
    return torch.stack([getattr(weights, name) * value for name, value in terms.items()]).sum()


def squared_error(given: Tensor, wanted: Tensor, mask: Tensor, count: float, limit: Tensor | None = None) -> Tensor:
    """Squared distance of states `(batch, time, width)`, summed over the width, mean over `count` tokens."""
    error = (given.float() - wanted.float()).square().sum(-1) * mask
    return (error if limit is None else error * share(wanted, limit)).sum() / count


def block_errors(given: tuple[Tensor, ...], wanted: tuple[Tensor, ...], mask: Tensor, count: float, scales: Scales) -> Tensor:
    """Fraction of variance unexplained of each block's output, `(layers,)`."""
    limits: list[Tensor | None] = [None] * len(wanted) if scales.limits is None else list(scales.limits)
    errors = [squared_error(a, b, mask, count, limit) for a, b, limit in zip(given, wanted, limits, strict=True)]
    return torch.stack(errors) / scales.blocks


def _wanted(teacher: Signals | Sampled) -> tuple[Callable[[slice], Any], Callable[..., Tensor]]:
    """What the teacher says of a piece of the tokens, and the KL from it."""
    if isinstance(teacher, Sampled):
        return teacher.__getitem__, sampled_kl
    theirs, head = teacher.hidden.flatten(0, 1), teacher.head
    return lambda piece: head(theirs[piece]), kl


def _token_terms(student: Signals, teacher: Signals | Sampled, batch: Batch, weights: LossConfig) -> dict[str, Tensor]:
    names = [name for name in ("kl", "reverse_kl", "ce") if getattr(weights, name)]
    targets = torch.roll(batch.tokens, -1, dims=1).flatten()
    mask, targeted = batch.mask.flatten(), next_token_mask(batch.mask).flatten()
    shares = {
        "kl": mask / batch.tokens_in_step,
        "reverse_kl": mask / batch.tokens_in_step,
        "ce": targeted / max(1.0, batch.targets_in_step),
    }
    mine = student.hidden.flatten(0, 1)
    wanted_in, apart = _wanted(teacher)
    slope_of = {**SLOPES, "kl": sampled_kl_slope} if isinstance(teacher, Sampled) else SLOPES

    def sums(piece: slice) -> Tensor:
        given, wanted = student.head(mine[piece]), wanted_in(piece)
        each: dict[str, Callable[[], Tensor]] = {
            "kl": lambda: apart(given, wanted, weights.temperature),
            "reverse_kl": lambda: reverse_kl(given, wanted, weights.temperature),
            "ce": lambda: F.cross_entropy(given.float(), targets[piece], reduction="none"),
        }
        return torch.stack([(each[name]() * shares[name][piece]).sum() for name in names])

    def slopes(given: Tensor, piece: slice) -> Iterator[tuple[Tensor, Tensor]]:
        wanted = wanted_in(piece)
        for name in names:
            last = name == names[-1]  # a slope overwrites what it is given
            heard = wanted if last or isinstance(wanted, Sampled) else wanted.clone()
            value, slope = slope_of[name](given if last else given.clone(), heard, targets[piece], weights.temperature)
            yield (value * shares[name][piece]).sum(), slope.mul_(shares[name][piece].unsqueeze(-1))

    pieces = (
        [slice(start, start + weights.chunk) for start in range(0, len(mine), weights.chunk)] if weights.chunk else [slice(None)]
    )
    if weights.chunk and torch.is_grad_enabled():
        total = in_pieces(student.head, slopes, pieces, len(names), mine)
    else:
        total = torch.stack([sums(piece) for piece in pieces]).sum(0)
    return dict(zip(names, total.unbind(), strict=True))
