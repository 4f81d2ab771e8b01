"""A model's linear maps by the faster of torch's libraries, `memory.products`, with nothing else changed.

Matrix products by the faster of torch's two libraries.

torch multiplies float32 matrices on a CPU with MKL, which uses no AVX-512 on processors that are not Intel's: there oneDNN,
which torch carries too, is twice as fast and reads a matrix for a single token at the memory's full speed
(`benchmarks/products.py`). Same sums in another order: results differ in the last digits. Which library is used depends on
the machine and on shapes alone, so that a run repeated on the same machine gives the same numbers.

Attention for training on a CPU in half precision, where torch's own kernel is slow.

On processors without matrix units for bfloat16 the fused kernel of torch 2.13 takes 2 to 4 times as long, forward and
backward, as the same sums written as two batched products (256 tokens, heads of 32; EXPERIMENTS.md).

Layer norms whose gradients do not depend on how many threads compute them.

torch 2.13 adds up the gradients of a LayerNorm's weight and bias on a CPU by thread: so many partial sums as there are
threads. Of everything that a GPT-2 and its memories compute nothing else does, with 1, 2, 4, 8 or 16 threads (EXPERIMENTS.md).
"""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

ONEDNN_MIN_OPERATIONS = 500_000
"""Multiplications from which a call of oneDNN, slower to begin, pays."""


def read_cpu_field(field: str = "model name") -> str:
    """What Linux says of the processor, its `model name` or `vendor_id`; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def onednn_is_faster() -> bool:
    """Whether this is a processor on which MKL leaves half of the speed unused, and oneDNN is there to use it."""
    both_available = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return (
        both_available
        and has_avx512
        and "intel" not in read_cpu_field("vendor_id").lower()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


gemm_library = "onednn" if onednn_is_faster() else "torch"
"""What multiplies float32 matrices on the CPU: `onednn`, or `torch` for whatever torch takes."""


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`hidden (..., inputs)` times `weight (outputs, inputs)` transposed, plus `bias (outputs,)`: as `F.linear`."""
    if gemm_library != "onednn" or not _can_use_onednn(hidden, weight, bias):
        return F.linear(hidden, weight, bias)
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    ):
        product: Tensor = _OneDNNLinearFunction.apply(hidden, weight, bias)
        return product
    return onednn_linear(hidden, weight, bias)


def _can_use_onednn(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    is_plain_float32 = all(
        tensor is None or (tensor.dtype == torch.float32 and tensor.device.type == "cpu")
        for tensor in (hidden, weight, bias)
    )
    is_large = hidden.dim() > 1 and hidden.numel() * len(weight) >= ONEDNN_MIN_OPERATIONS
    return is_plain_float32 and is_large and not torch.is_autocast_enabled("cpu")


def onednn_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` by oneDNN, without a graph; float32 on the CPU, any strides."""
    return torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")


class _OneDNNLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return onednn_linear(hidden, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        needs_grad = ctx.needs_input_grad
        flat_grad, flat_hidden = grad_output.flatten(0, -2), hidden.flatten(0, -2)
        grad_hidden = onednn_linear(grad_output, weight.t()) if needs_grad[0] else None
        grad_weight = onednn_linear(flat_grad.t(), flat_hidden.t()) if needs_grad[1] else None
        return grad_hidden, grad_weight, flat_grad.sum(0) if needs_grad[2] else None


class OneDNNLinear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, hidden: Tensor) -> Tensor:
        """`(..., inputs)` to `(..., outputs)`."""
        return linear(hidden, self.weight, self.bias)


BATCHED_ATTENTION = "dmt_batched"
MAX_BATCHED_TOKENS = 1_024
"""Tokens up to which all scores of a window are held at once."""


def batched_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention as two batched products, in bfloat16 on a CPU over a whole window; anything else is torch's kernel.

    Shapes as transformers has them: `(batch, heads, time, size)` in, `(batch, time, heads, size)` out.
    """
    batch, heads, time, size = query.shape
    unsupported = (
        attention_mask is not None
        or kwargs.get("dropout")
        or kwargs.get("position_bias") is not None
        or kwargs.get("cache")
    )
    if (
        query.dtype != torch.bfloat16
        or query.device.type != "cpu"
        or unsupported
        or key.shape[2] != time
        or not 1 < time <= MAX_BATCHED_TOKENS
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if groups := heads // key.shape[1] if heads != key.shape[1] else 0:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = kwargs.get("scaling") or size**-0.5
    flat = [tensor.reshape(batch * heads, time, size) for tensor in (query, key, value)]
    scores = torch.baddbmm(_causal_mask(time), flat[0], flat[1].transpose(1, 2), alpha=scale)
    output = torch.bmm(torch.softmax(scores, dim=-1), flat[2])
    return output.view(batch, heads, time, size).transpose(1, 2).contiguous(), None


@lru_cache(maxsize=4)
def _causal_mask(time: int) -> Tensor:
    return torch.full((1, time, time), float("-inf"), dtype=torch.bfloat16).triu(1)


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Let `model` attend by `batched` or by `sdpa`, torch's own kernel."""
    model.set_attn_implementation(BATCHED_ATTENTION if name == "batched" else "sdpa")


AttentionInterface.register(BATCHED_ATTENTION, batched_attention)
AttentionMaskInterface.register(BATCHED_ATTENTION, sdpa_mask)


class DeterministicLayerNorm(nn.LayerNorm):
    """A LayerNorm with the same values, whose weight's and bias's gradients are summed over all rows at once on a CPU."""

    def forward(self, hidden: Tensor) -> Tensor:
        if self.weight is None or hidden.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(hidden)
        normed: Tensor = _DeterministicLayerNormFunction.apply(
            hidden, self.weight, self.bias, self.eps
        )
        return normed


def set_layer_norms(model: nn.Module, deterministic: bool) -> None:
    """Let every LayerNorm of `model` be a `SteadyLayerNorm`, or be torch's own again; its tensors stay where they are."""
    old_class, new_class = (
        (nn.LayerNorm, DeterministicLayerNorm)
        if deterministic
        else (DeterministicLayerNorm, nn.LayerNorm)
    )
    for module in model.modules():
        if type(module) is old_class:
            module.__class__ = new_class


class _DeterministicLayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> Tensor:
        normed, mean, rstd = torch.native_layer_norm(hidden, weight.shape, weight, bias, eps)
        ctx.save_for_backward(hidden, weight, bias, mean, rstd)
        return normed

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, mean, rstd = ctx.saved_tensors
        (grad_normed,), needs_grad = grad_outputs, ctx.needs_input_grad
        grad_hidden = grad_weight = grad_bias = None
        if needs_grad[0]:
            grad_hidden = torch.ops.aten.native_layer_norm_backward(
                grad_normed, hidden, weight.shape, mean, rstd, weight, bias, [True, False, False]
            )[0]
        if needs_grad[1]:
            grad_weight = (
                (grad_normed * ((hidden - mean) * rstd)).sum_to_size(weight.shape).to(weight.dtype)
            )
        if needs_grad[2]:
            grad_bias = grad_normed.to(mean.dtype).sum_to_size(weight.shape).to(weight.dtype)
        return grad_hidden, grad_weight, grad_bias, None


ModelT = TypeVar("ModelT", bound=nn.Module)


class OneDNNConv1D(Conv1D):
    """GPT-2's way of writing a linear map, by `linear`."""

    def forward(self, hidden: Tensor) -> Tensor:
        """`(..., inputs)` to `(..., outputs)`."""
        return linear(hidden, self.weight.t(), self.bias)


def use_onednn_linear(model: ModelT) -> ModelT:
    """Let every linear map in `model` take `linear`; same parameters, same names, same object."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear
        elif type(module) is Conv1D:
            module.__class__ = OneDNNConv1D
    return model


def kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute KL(teacher || student) per token in nats, times temperature squared.

    Args:
        student_logits: logits `(..., vocabulary)`.
        teacher_logits: logits of the same shape.
        temperature: divides both logits.

    Source: Hinton et al. 2015, arXiv 1503.02531, section 2 (the square keeps gradients comparable).
    """
    teacher_log_probs = _tempered_log_probs(teacher_logits, temperature)
    student_log_probs = _tempered_log_probs(student_logits, temperature)
    divergence = F.kl_div(student_log_probs, teacher_log_probs, reduction="none", log_target=True)
    return divergence.sum(-1) * temperature**2


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute KL(student || teacher) per token in nats, times temperature squared."""
    return kl(teacher_logits, student_logits, temperature)


def _tempered_log_probs(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(logits.float() / temperature, dim=-1)


def kl_with_grad(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Compute `kl` per token and its gradient in `student_logits` without a graph.

    Both logits `(tokens, vocabulary)` are overwritten.
    """
    student_logits = divide_by_temperature(student_logits, temperature)
    teacher_logits = divide_by_temperature(teacher_logits, temperature)
    teacher_probs, teacher_lse = softmax_and_logsumexp(teacher_logits)
    value = torch.linalg.vecdot(teacher_probs, teacher_logits.sub_(student_logits))
    student_probs, student_lse = softmax_and_logsumexp(student_logits, student_logits)
    grad = multiply_by_temperature(student_probs.sub_(teacher_probs), temperature)
    return (value + student_lse - teacher_lse) * temperature**2, grad


def reverse_kl_with_grad(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Compute `reverse_kl` per token and its gradient in `student_logits` without a graph.

    Both logits `(tokens, vocabulary)` are overwritten.
    """
    student_logits = divide_by_temperature(student_logits, temperature)
    teacher_logits = divide_by_temperature(teacher_logits, temperature)
    student_probs, student_lse = softmax_and_logsumexp(student_logits)
    log_ratio = student_logits.sub_(teacher_logits)
    _, teacher_lse = softmax_and_logsumexp(teacher_logits, teacher_logits)
    value = torch.linalg.vecdot(student_probs, log_ratio)
    grad = log_ratio.sub_(value.unsqueeze(-1)).mul_(student_probs)
    grad = multiply_by_temperature(grad, temperature)
    return (value - student_lse + teacher_lse) * temperature**2, grad


def ce_with_grad(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of `targets` `(tokens,)` and its gradient in `student_logits`.

    Teacher and temperature are ignored. `student_logits` `(tokens, vocabulary)` are overwritten.
    """
    student_logits = divide_by_temperature(student_logits, 1.0)
    target_index = targets.unsqueeze(-1)
    target_logits = student_logits.gather(-1, target_index).squeeze(-1)
    student_probs, student_lse = softmax_and_logsumexp(student_logits, student_logits)
    minus_one = torch.full_like(target_index, -1, dtype=student_probs.dtype)
    return student_lse - target_logits, student_probs.scatter_add_(-1, target_index, minus_one)


def divide_by_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide logits by the temperature in float32, in place where they are float32 already."""
    logits = logits.float()
    return logits if temperature == 1 else logits.div_(temperature)


def multiply_by_temperature(grad: Tensor, temperature: float) -> Tensor:
    """Multiply a gradient by the temperature in place."""
    return grad if temperature == 1 else grad.mul_(temperature)


def softmax_and_logsumexp(logits: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute probabilities, written to `out` if it is set, and the log-sum-exp per token."""
    top = logits.max(-1, keepdim=True)
    max_logits = top.values.clone()
    probs = torch.softmax(logits, dim=-1) if out is None else torch.softmax(logits, dim=-1, out=out)
    return probs, (max_logits - probs.gather(-1, top.indices).log()).squeeze(-1)
