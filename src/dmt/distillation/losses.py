"""Losses between a student's signals and a teacher's: masked, per token, independent of how a batch is split.

Every term is a sum over valid tokens divided by a count that the caller gives, the number of valid tokens of the whole
batch. So the gradient is the same however many pieces the batch is computed in. Each term's name is its weight's name.

A few tokens, mostly a window's first, get block outputs hundreds of times as long as others: they say nothing of the rest.

In SmolLM2 one such token is 25,000 long where the median is 32. Counted like any other it would set every mean, every
variance and the whole of a squared error, so what is measured over tokens leaves such tokens out and errors weigh them less.

Source: massive activations, Sun et al. 2024, arXiv 2402.17762.

Losses over a vocabulary in pieces: one piece's logits exist at a time, and their gradient is known without a graph.

A student's and a teacher's logits for 2,048 tokens of 50,000 words are a hundred million numbers each, and an automatic
gradient keeps several such. Here each piece's gradient goes through the head at once and only what it leaves on hidden
states and the head's weights is kept.

Source: the idea of Liger Kernel's fused linear losses (Hsu et al. 2024, arXiv 2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmt.config import LossConfig
from dmt.distillation.logit_cache import SparseDistribution, control_variate_weight, sampled_kl
from dmt.models.forward import ForwardOutputs
from dmt.ops import (
    OneDNNLinear,
    ce_with_grad,
    divide_by_temperature,
    kl,
    kl_with_grad,
    linear,
    multiply_by_temperature,
    reverse_kl,
    reverse_kl_with_grad,
    softmax_and_logsumexp,
)

OUTLIER_FACTOR = 10.0
"""A state longer than this many times the median is an outlier."""


def outlier_threshold(states: Tensor) -> Tensor:
    """Length `()` beyond which one of these states `(..., width)` is an outlier."""
    return OUTLIER_FACTOR * states.float().norm(dim=-1).median()


def inlier_mask(states: Tensor) -> Tensor:
    """Which of `states` `(..., width)` are no outliers: a mask `(...)`."""
    return states.float().norm(dim=-1) <= outlier_threshold(states)


def outlier_weights(states: Tensor, outlier_norm: Tensor) -> Tensor:
    """What each state's squared error counts `(...)`: 1, or less by the square of how much longer than `limit` it is."""
    return (
        (outlier_norm / states.float().norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny))
        .square()
        .clamp(max=1)
    )


ChunkTerms = Callable[[Tensor, slice], Iterator[tuple[Tensor, Tensor]]]
"""For a piece's logits, which it may overwrite, and its place: each term, a scalar, and its gradient in the logits."""


def sampled_kl_with_grad(
    student_logits: Tensor, teacher: SparseDistribution, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """`sampled_kl` per token and its gradient in `given` `(tokens, vocabulary)`, which is overwritten."""
    student_logits = divide_by_temperature(student_logits, temperature)
    student_log_probs = student_logits.gather(-1, teacher.ids)
    student_probs, student_lse = softmax_and_logsumexp(student_logits, student_logits)
    student_log_probs -= student_lse.unsqueeze(-1)
    weights, control_weight = (
        teacher.weights,
        control_variate_weight(teacher, student_log_probs).unsqueeze(-1),
    )
    control = control_weight * (weights / teacher.log_probs.exp() * student_log_probs.exp())
    value = (weights * (teacher.log_probs - student_log_probs) + control).sum(
        -1
    ) - control_weight.squeeze(-1)
    grad = student_probs.mul_((weights - control).sum(-1, keepdim=True)).scatter_add_(
        -1, teacher.ids, control - weights
    )
    return value * temperature**2, multiply_by_temperature(grad, temperature)


TERMS_WITH_GRAD: dict[str, Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "kl": kl_with_grad,
    "reverse_kl": reverse_kl_with_grad,
    "ce": ce_with_grad,
}
"""Value and gradient of each term that is about logits, by the term's name."""


def chunked_loss(
    head: nn.Module, chunk_terms: ChunkTerms, chunks: list[slice], num_terms: int, hidden: Tensor
) -> Tensor:
    """Terms, summed over pieces of `hidden` `(tokens, width)`, as one tensor `(terms,)` that gradients flow through."""
    head_params = [parameter for parameter in head.parameters() if parameter.requires_grad]
    totals: Tensor = _ChunkedLoss.apply(head, chunk_terms, chunks, num_terms, hidden, *head_params)
    return totals


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: nn.Module,
        chunk_terms: ChunkTerms,
        chunks: list[slice],
        num_terms: int,
        hidden: Tensor,
        *head_params: Tensor,
    ) -> Tensor:
        grads = [
            hidden.new_zeros(num_terms, *hidden.shape),
            *(weight.new_zeros(num_terms, *weight.shape) for weight in head_params),
        ]
        totals = torch.zeros(num_terms, device=hidden.device)
        is_linear = _is_plain_linear(head, hidden)
        for chunk in chunks:
            with torch.set_grad_enabled(not is_linear):
                chunk_hidden = hidden[chunk].detach().requires_grad_(not is_linear)
                logits = head(chunk_hidden)
            for term, (value, logit_grad) in enumerate(chunk_terms(logits.detach(), chunk)):
                totals[term] += value
                if is_linear:  # added up in place: a gradient of the whole head for each piece would be as large as the head
                    grads[0][term, chunk] = linear(logit_grad, head.weight.t())  # type: ignore[assignment]
                    for weight_grad in grads[1:]:
                        weight_grad[term].addmm_(logit_grad.t(), chunk_hidden)
                    continue
                hidden_grad, *chunk_weight_grads = torch.autograd.grad(
                    logits,
                    [chunk_hidden, *head_params],
                    logit_grad.to(logits.dtype),
                    retain_graph=term < num_terms - 1,
                )
                grads[0][term, chunk] = hidden_grad
                for weight_grad, chunk_weight_grad in zip(
                    grads[1:], chunk_weight_grads, strict=True
                ):
                    weight_grad[term] += chunk_weight_grad
        ctx.save_for_backward(*grads)
        return totals

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if upstream[0].numel() == 1:
            scale = upstream[
                0
            ].item()  # one, as a rule, and then there is nothing to do for millions of numbers
            grads = [saved[0] if scale == 1 else saved[0] * scale for saved in ctx.saved_tensors]
        else:
            grads = [
                torch.tensordot(upstream[0].to(saved.dtype), saved, dims=1)
                for saved in ctx.saved_tensors
            ]
        return None, None, None, None, *grads


def _is_plain_linear(head: nn.Module, hidden: Tensor) -> bool:
    """Whether a head is a product with its weight and no more, so that its gradient can be written down."""
    has_hooks = head._forward_hooks or head._forward_pre_hooks
    autocast_enabled = torch.is_autocast_enabled(hidden.device.type)
    return (
        type(head) in (nn.Linear, OneDNNLinear)
        and head.bias is None
        and not has_hooks
        and not autocast_enabled
        and head.weight.dtype == hidden.dtype == torch.float32
    )


@dataclass(frozen=True)
class LossScales:
    """Variances that turn squared errors into fractions: summed over the width, one per layer and one for the last hidden.

    Fixed before training: the variance of a batch would make the loss depend on how a batch is split.
    """

    block_variances: Tensor  # (layers,)
    hidden_variance: Tensor  # ()
    outlier_norms: Tensor | None = (
        None  # (layers,): length beyond which a block's output counts less, see `outliers`
    )


@dataclass(frozen=True)
class Batch:
    """Token ids `(batch, time)`, which of them count (same shape, bool), and how many do in the whole step.

    Attributes:
        tokens_in_step: valid tokens of the step, over all pieces and processes: the divisor of `kl` and the like.
        targets_in_step: valid next tokens of the step: the divisor of `ce`.
        window_ids: indices of the windows in the training data `(batch,)`, for the logit cache.
    """

    tokens: Tensor
    mask: Tensor
    tokens_in_step: float
    targets_in_step: float
    window_ids: Tensor | None = None

    @staticmethod
    def full_step(tokens: Tensor, mask: Tensor | None = None) -> Batch:
        """A batch that is a step of its own."""
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        return Batch(tokens, mask, float(mask.sum()), float(next_token_mask(mask).sum()))


def next_token_mask(mask: Tensor) -> Tensor:
    """Positions whose next token counts: `(batch, time)`, false at the last position."""
    return F.pad(mask[:, :-1] & mask[:, 1:], (0, 1))


def compute_loss_terms(
    student: ForwardOutputs,
    teacher: ForwardOutputs | SparseDistribution,
    batch: Batch,
    weights: LossConfig,
    scales: LossScales,
    layers: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """The terms whose weight is not zero, unweighted, each a scalar: nats per token or a fraction of variance.

    Args:
        teacher: what it says now, or its distributions as they were kept, which know of `kl` and `ce` alone.
        layers: whose blocks `block` is about; all where it is left out.
    """
    terms: dict[str, Tensor] = {}
    if weights.kl or weights.reverse_kl or weights.ce:
        terms.update(_compute_token_terms(student, teacher, batch, weights))
    if isinstance(teacher, SparseDistribution):
        return terms
    mask, num_tokens = batch.mask, batch.tokens_in_step
    if weights.hidden_mse:
        terms["hidden_mse"] = (
            squared_error(student.hidden, teacher.hidden, mask, num_tokens) / scales.hidden_variance
        )
    if weights.hidden_cosine:
        similarity = F.cosine_similarity(student.hidden.float(), teacher.hidden.float(), dim=-1)
        terms["hidden_cosine"] = ((1 - similarity) * mask).sum() / num_tokens
    if weights.block_fvu:
        fvu = block_fvu(student.block_outputs, teacher.block_outputs, mask, num_tokens, scales)
        terms["block_fvu"] = fvu.mean() if layers is None else fvu[list(layers)].mean()
    return terms


def sum_weighted_terms(terms: dict[str, Tensor], weights: LossConfig) -> Tensor:
    """The loss: every term times the setting of its name."""
    return torch.stack([getattr(weights, name) * value for name, value in terms.items()]).sum()


def squared_error(
    output: Tensor,
    target: Tensor,
    mask: Tensor,
    num_tokens: float,
    outlier_norm: Tensor | None = None,
) -> Tensor:
    """Squared distance of states `(batch, time, width)`, summed over the width, mean over `count` tokens."""
    error = (output.float() - target.float()).square().sum(-1) * mask
    return (
        error if outlier_norm is None else error * outlier_weights(target, outlier_norm)
    ).sum() / num_tokens


def block_fvu(
    outputs: tuple[Tensor, ...],
    targets: tuple[Tensor, ...],
    mask: Tensor,
    num_tokens: float,
    scales: LossScales,
) -> Tensor:
    """Fraction of variance unexplained of each block's output, `(layers,)`."""
    outlier_norms: list[Tensor | None] = (
        [None] * len(targets) if scales.outlier_norms is None else list(scales.outlier_norms)
    )
    errors = [
        squared_error(output, target, mask, num_tokens, outlier_norm)
        for output, target, outlier_norm in zip(outputs, targets, outlier_norms, strict=True)
    ]
    return torch.stack(errors) / scales.block_variances


def _select_teacher_fns(
    teacher: ForwardOutputs | SparseDistribution,
) -> tuple[Callable[[slice], Any], Callable[..., Tensor]]:
    """What the teacher says of a piece of the tokens, and the KL from it."""
    if isinstance(teacher, SparseDistribution):
        return teacher.__getitem__, sampled_kl
    teacher_hidden, head = teacher.hidden.flatten(0, 1), teacher.head
    return lambda chunk: head(teacher_hidden[chunk]), kl


def _compute_token_terms(
    student: ForwardOutputs,
    teacher: ForwardOutputs | SparseDistribution,
    batch: Batch,
    weights: LossConfig,
) -> dict[str, Tensor]:
    names = [name for name in ("kl", "reverse_kl", "ce") if getattr(weights, name)]
    targets = torch.roll(batch.tokens, -1, dims=1).flatten()
    mask, target_mask = batch.mask.flatten(), next_token_mask(batch.mask).flatten()
    token_weights = {
        "kl": mask / batch.tokens_in_step,
        "reverse_kl": mask / batch.tokens_in_step,
        "ce": target_mask / max(1.0, batch.targets_in_step),
    }
    student_hidden = student.hidden.flatten(0, 1)
    get_teacher_chunk, kl_fn = _select_teacher_fns(teacher)
    grad_fns = (
        {**TERMS_WITH_GRAD, "kl": sampled_kl_with_grad}
        if isinstance(teacher, SparseDistribution)
        else TERMS_WITH_GRAD
    )

    def sum_chunk_terms(chunk: slice) -> Tensor:
        student_logits, teacher_chunk = (
            student.head(student_hidden[chunk]),
            get_teacher_chunk(chunk),
        )
        loss_fns: dict[str, Callable[[], Tensor]] = {
            "kl": lambda: kl_fn(student_logits, teacher_chunk, weights.temperature),
            "reverse_kl": lambda: reverse_kl(student_logits, teacher_chunk, weights.temperature),
            "ce": lambda: F.cross_entropy(student_logits.float(), targets[chunk], reduction="none"),
        }
        return torch.stack(
            [(loss_fns[name]() * token_weights[name][chunk]).sum() for name in names]
        )

    def iter_terms_with_grad(
        student_logits: Tensor, chunk: slice
    ) -> Iterator[tuple[Tensor, Tensor]]:
        teacher_chunk = get_teacher_chunk(chunk)
        for name in names:
            is_last = name == names[-1]  # a slope overwrites what it is given
            teacher_copy = (
                teacher_chunk
                if is_last or isinstance(teacher_chunk, SparseDistribution)
                else teacher_chunk.clone()
            )
            value, grad = grad_fns[name](
                student_logits if is_last else student_logits.clone(),
                teacher_copy,
                targets[chunk],
                weights.temperature,
            )
            yield (
                (value * token_weights[name][chunk]).sum(),
                grad.mul_(token_weights[name][chunk].unsqueeze(-1)),
            )

    chunks = (
        [
            slice(start, start + weights.chunk_size)
            for start in range(0, len(student_hidden), weights.chunk_size)
        ]
        if weights.chunk_size
        else [slice(None)]
    )
    if weights.chunk_size and torch.is_grad_enabled():
        totals = chunked_loss(
            student.head, iter_terms_with_grad, chunks, len(names), student_hidden
        )
    else:
        totals = torch.stack([sum_chunk_terms(chunk) for chunk in chunks]).sum(0)
    return dict(zip(names, totals.unbind(), strict=True))
