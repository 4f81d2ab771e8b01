"""Losses between student and teacher: masked, per token, independent of micro-batches.

Every term is a sum over valid tokens divided by the number of valid tokens of the whole step, so
the gradient does not depend on how a step is split. A term has the name of its weight in
`LossConfig`. A loss of your own is a function that `register_loss` names; its weight is in
`loss.extra`.

Chunks. Student's and teacher's logits for 2,048 tokens of a vocabulary of 50,000 are 100 million
numbers each, and automatic gradients keep several such tensors. With `loss.chunk_size` the logits
of one chunk exist at a time; their gradient is computed in closed form and goes through the head at
once. Source: the idea of Liger Kernel's fused linear losses, Hsu et al. 2024, arXiv 2410.10989.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dmt.config import LOSS_TERMS, LossConfig
from dmt.data.declared_text import AnswerPositions
from dmt.distillation.logit_cache import SparseDistribution, control_variate_weight, sampled_kl
from dmt.errors import UserError
from dmt.models.forward import ForwardOutputs, forward_teacher
from dmt.ops import (
    OneDNNLinear,
    ce_with_grad,
    divide_by_temperature,
    inlier_mask,
    kl,
    kl_with_grad,
    linear,
    multiply_by_temperature,
    outlier_threshold,
    reverse_kl,
    reverse_kl_with_grad,
    softmax_and_logsumexp,
)

# Takes the logits of a chunk, which it may overwrite, and the chunk; yields for each term its value
# () and its gradient in the logits.
ChunkTerms = Callable[[Tensor, slice], Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class LossScales:
    """Variances of the teacher, summed over the width, that turn squared errors into fractions.

    They are fixed before training: with the variance of a batch the loss would depend on how a
    step is split.

    Attributes:
        block_variances: of each block's output, `(layers,)`.
        hidden_variance: of the last hidden state, `()`.
        outlier_norms: norm from which a block's output is an outlier, `(layers,)`.
    """

    block_variances: Tensor
    hidden_variance: Tensor
    outlier_norms: Tensor | None = None


@torch.no_grad()
def measure_scales(teacher: PreTrainedModel, windows: Tensor) -> LossScales:
    """Measure the variances of the teacher's block outputs and last hidden states.

    Args:
        teacher: the model.
        windows: token ids `(windows, time)`; outliers are left out.
    """
    teacher_outputs = forward_teacher(teacher, windows, capture_blocks=True)
    block_outputs = teacher_outputs.block_outputs
    return LossScales(
        torch.stack([_variance(states) for states in block_outputs]),
        _variance(teacher_outputs.hidden),
        torch.stack([outlier_threshold(states) for states in block_outputs]),
    )


def _variance(states: Tensor) -> Tensor:
    return states[inlier_mask(states)].float().var(0, correction=0).sum()


@dataclass(frozen=True)
class DeclaredAnswers:
    """Answers of declared facts in a micro-batch, which the student must not know.

    Attributes:
        tokens: the text with its own subjects, token ids `(batch, time)`.
        positions: what predicts a token of an answer.
    """

    tokens: Tensor
    positions: AnswerPositions


@dataclass(frozen=True)
class Batch:
    """Token ids of a micro-batch and how many tokens count in the whole step.

    Attributes:
        tokens: token ids `(batch, time)`.
        mask: which tokens count, bool of the same shape.
        tokens_in_step: valid tokens of the step on this process, the divisor of most terms.
        targets_in_step: valid next tokens of the step on this process, the divisor of `ce`.
        window_ids: indices of the windows in the training data `(batch,)`, for the logit cache.
        declared: where the text asks for declared facts, whose subjects `tokens` do not have.
    """

    tokens: Tensor
    mask: Tensor
    tokens_in_step: float
    targets_in_step: float
    window_ids: Tensor | None = None
    declared: DeclaredAnswers | None = None

    @staticmethod
    def full_step(tokens: Tensor, mask: Tensor | None = None) -> Batch:
        """Make a batch that is a whole step."""
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        return Batch(tokens, mask, float(mask.sum()), float(next_token_mask(mask).sum()))


# From the outputs of student and teacher, with those of their blocks, and the batch to a value of
# each token, `(batch, time)`.
LossFunction = Callable[[ForwardOutputs, ForwardOutputs, Batch], Tensor]
_LOSSES: dict[str, LossFunction] = {}


def register_loss(name: str, loss: LossFunction) -> None:
    """Make a loss of the end-to-end stage available under a name in `loss.extra`.

    The term is the mean over the tokens that count; `loss.extra={name: weight}` adds it to the
    loss. A loss in a module of your own needs no registration:
    `loss.extra={my_module:my_loss: 0.5}`.

    Args:
        name: a word, as in `dmt config` and in the metric `train/name`.
        loss: takes the student's outputs, the teacher's and the batch; returns a value of each
            token, `(batch, time)`, which must not depend on other sequences of the batch.

    Raises:
        UserError: the name is no word, or it is taken.
    """
    registered = _LOSSES.get(name)
    is_taken = name in (*LOSS_TERMS, "loss") or (registered not in (None, loss))
    if is_taken or not name.isidentifier():
        raise UserError(f"name={name!r} is taken or not a word; choose another name")
    _LOSSES[name] = loss


def get_loss(name: str) -> LossFunction:
    """Return a loss by its registered name, or import `my_package.my_module:my_loss`.

    Raises:
        UserError: there is no such loss.
    """
    if name in _LOSSES:
        return _LOSSES[name]
    module_name, _, function_name = name.partition(":")
    try:
        loss: LossFunction = getattr(import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"loss.extra has no loss {name} ({error}); register it with dmt.register_loss, or name "
            "it as my_package.my_module:my_loss"
        ) from None
    return loss


def compute_loss_terms(
    student: ForwardOutputs,
    teacher: ForwardOutputs | SparseDistribution,
    batch: Batch,
    weights: LossConfig,
    scales: LossScales,
    layers: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Compute the terms whose weight is not zero, unweighted.

    Args:
        student: outputs of the student for the tokens of the batch.
        teacher: outputs of the teacher, or its cached distributions, which allow `kl` and `ce`.
        batch: the tokens and which of them count.
        weights: weights of the terms, temperature and chunk size.
        scales: variances of the teacher.
        layers: layers of the term `block_fvu`; all if None.

    Returns:
        A scalar for each term: nats per token or a fraction of variance.
    """
    terms: dict[str, Tensor] = {}
    if weights.kl or weights.reverse_kl or weights.ce:
        terms.update(_compute_token_terms(student, teacher, batch, weights))
    if isinstance(teacher, SparseDistribution):
        return terms
    mask, num_tokens = batch.mask, batch.tokens_in_step
    if weights.hidden_mse:
        error = squared_error(student.hidden, teacher.hidden, mask, num_tokens)
        terms["hidden_mse"] = error / scales.hidden_variance
    if weights.hidden_cosine:
        similarity = F.cosine_similarity(student.hidden.float(), teacher.hidden.float(), dim=-1)
        terms["hidden_cosine"] = ((1 - similarity) * mask).sum() / num_tokens
    if weights.block_fvu:
        fvu = block_fvu(student.block_outputs, teacher.block_outputs, mask, num_tokens, scales)
        terms["block_fvu"] = fvu.mean() if layers is None else select_layers(fvu, layers).mean()
    for name, weight in weights.extra.items():
        if weight:
            values = get_loss(name)(student, teacher, batch)
            if values.shape != mask.shape:
                raise UserError(
                    f"loss.extra.{name} must return a value per token {tuple(mask.shape)}, got "
                    f"{tuple(values.shape)}"
                )
            terms[name.rpartition(":")[2]] = (values.float() * mask).sum() / num_tokens
    return terms


def select_layers(values: Tensor, layers: Sequence[int]) -> Tensor:
    """Return the values of some layers `(n,)`; a list as index would be copied to the device."""
    return torch.stack([values[layer] for layer in layers])


def sum_weighted_terms(terms: dict[str, Tensor], weights: LossConfig) -> Tensor:
    """Return the loss: every term times the weight of its name, summed."""
    by_name = weights.term_weights()
    return torch.stack([by_name.get(name, 0.0) * value for name, value in terms.items()]).sum()


def next_token_mask(mask: Tensor) -> Tensor:
    """Return the positions whose next token counts, `(batch, time)`, false at the last one."""
    return F.pad(mask[:, :-1] & mask[:, 1:], (0, 1))


def squared_error(
    output: Tensor,
    target: Tensor,
    mask: Tensor,
    num_tokens: float,
    outlier_norm: Tensor | None = None,
) -> Tensor:
    """Compute the squared distance of states `(batch, time, width)`, a mean over `num_tokens`."""
    error = (output.float() - target.float()).square().sum(-1) * mask
    if outlier_norm is not None:
        error = error * outlier_weights(target, outlier_norm)
    return error.sum() / num_tokens


def block_fvu(
    outputs: tuple[Tensor, ...],
    targets: tuple[Tensor, ...],
    mask: Tensor,
    num_tokens: float,
    scales: LossScales,
) -> Tensor:
    """Compute the fraction of variance unexplained of each block's output, `(layers,)`."""
    outlier_norms: list[Tensor | None] = (
        [None] * len(targets) if scales.outlier_norms is None else list(scales.outlier_norms)
    )
    errors = [
        squared_error(output, target, mask, num_tokens, outlier_norm)
        for output, target, outlier_norm in zip(outputs, targets, outlier_norms, strict=True)
    ]
    return torch.stack(errors) / scales.block_variances


def outlier_weights(states: Tensor, outlier_norm: Tensor) -> Tensor:
    """Return the weight of each state's squared error, `(...)`.

    It is 1, or for outliers the square of `outlier_norm` divided by their norm.
    """
    norms = states.float().norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return (outlier_norm / norms).square().clamp(max=1)


def sampled_kl_with_grad(
    student_logits: Tensor, teacher: SparseDistribution, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Compute `sampled_kl` per token and its gradient in `student_logits` without a graph.

    `student_logits` `(tokens, vocabulary)` are overwritten.
    """
    student_logits = divide_by_temperature(student_logits, temperature)
    student_log_probs = student_logits.gather(-1, teacher.ids)
    student_probs, student_lse = softmax_and_logsumexp(student_logits, student_logits)
    student_log_probs -= student_lse.unsqueeze(-1)
    weights = teacher.weights
    control_weight = control_variate_weight(teacher, student_log_probs).unsqueeze(-1)
    control = control_weight * (weights / teacher.log_probs.exp() * student_log_probs.exp())
    value = (weights * (teacher.log_probs - student_log_probs) + control).sum(-1)
    value = value - control_weight.squeeze(-1)
    grad = student_probs.mul_((weights - control).sum(-1, keepdim=True)).scatter_add_(
        -1, teacher.ids, control - weights
    )
    return value * temperature**2, multiply_by_temperature(grad, temperature)


# Value and gradient of each term over the vocabulary, by the name of the term.
TERMS_WITH_GRAD: dict[str, Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "kl": kl_with_grad,
    "reverse_kl": reverse_kl_with_grad,
    "ce": ce_with_grad,
}


def chunked_loss(
    head: nn.Module, chunk_terms: ChunkTerms, chunks: list[slice], num_terms: int, hidden: Tensor
) -> Tensor:
    """Sum terms over chunks of `hidden` `(tokens, width)`; gradients flow through the result.

    Args:
        head: from hidden states to logits.
        chunk_terms: values and gradients of the terms of a chunk.
        chunks: slices of the tokens.
        num_terms: number of terms.
        hidden: hidden states.

    Returns:
        The terms, `(terms,)`.
    """
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
                if is_linear:
                    # In place: a gradient of the head for each chunk is as large as the head.
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
            scale = upstream[0].item()  # mostly 1, which saves a pass over millions of numbers
            grads = [saved[0] if scale == 1 else saved[0] * scale for saved in ctx.saved_tensors]
        else:
            grads = [
                torch.tensordot(upstream[0].to(saved.dtype), saved, dims=1)
                for saved in ctx.saved_tensors
            ]
        return None, None, None, None, *grads


def _is_plain_linear(head: nn.Module, hidden: Tensor) -> bool:
    """Return whether a head is only a product with its weight, so its gradient is known."""
    has_hooks = head._forward_hooks or head._forward_pre_hooks
    autocast_enabled = torch.is_autocast_enabled(hidden.device.type)
    return (
        type(head) in (nn.Linear, OneDNNLinear)
        and head.bias is None
        and not has_hooks
        and not autocast_enabled
        and head.weight.dtype == hidden.dtype == torch.float32
    )


def _select_teacher_fns(
    teacher: ForwardOutputs | SparseDistribution,
) -> tuple[Callable[[slice], Any], Callable[..., Tensor]]:
    """Return a function from a chunk to the teacher's logits or distributions, and their KL."""
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
            is_last = name == names[-1]  # the functions overwrite their arguments
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
