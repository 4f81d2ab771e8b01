"""Tensor operations that several packages share: products, LayerNorm, solvers, divergences.

Matrix products. torch multiplies float32 matrices on a CPU with MKL, which uses no AVX-512 on
processors that are not Intel's. There oneDNN, which torch ships too, is twice as fast and reads a
matrix for a single token at the full speed of the memory (`benchmarks/products.py`). It sums in
another order, so results differ in the last digits. The choice depends on the machine and on
shapes alone: a run repeated on the same machine gives the same numbers. On Intel's processors MKL
also chooses by the number of threads, unless MKL_CBWR forbids it, at no cost that was seen. So this
module sets it to `AUTO,STRICT` where it is unset. oneDNN's bfloat16 products on AMX stay different.

LayerNorm. On a CPU, torch 2.13 sums the gradients of weight and bias in as many partial sums as
there are threads. Nothing else that a GPT-2 and its memories compute depends on the number of
threads (docs/experiments), so `DeterministicLayerNorm` makes training independent of it.

Outliers. A few tokens, mostly the first of a window, have block outputs hundreds of times as long
as others. In SmolLM2 one such token has norm 25,000 where the median is 32. Counted like any other
it would dominate means, variances and squared errors, so statistics leave out such tokens and
errors weigh them less. Source: massive activations, Sun et al. 2024, arXiv 2402.17762.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# MKL reads it at its first product.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

ModelT = TypeVar("ModelT", bound=nn.Module)
ResultT = TypeVar("ResultT")
# Work that yields tensors and a device, and receives them on that device.
CopyTask = Generator[tuple[Sequence[Tensor], torch.device], list[Tensor], ResultT]

# Multiplications from which a call of oneDNN, which takes longer to start, pays off.
ONEDNN_MIN_OPERATIONS = 500_000
# Default ridge of `solve_ridge`, as a share of the mean variance of the inputs.
RIDGE = 1e-3
# Samples of which `solve_sparse_ridge` makes a dense matrix at once.
KERNEL_CHUNK_SAMPLES = 128
# A state is an outlier if its norm is this many times the median.
OUTLIER_FACTOR = 10.0


def read_cpu_field(field: str = "model name") -> str:
    """Return a field of Linux's `/proc/cpuinfo`; elsewhere the processor name Python reports."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def onednn_is_faster() -> bool:
    """Return whether MKL leaves half of this processor's speed unused and oneDNN is available."""
    both_available = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return (
        both_available
        and has_avx512
        and "intel" not in read_cpu_field("vendor_id").lower()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


# The library that multiplies float32 matrices on the CPU: `onednn`, or `torch` for its default.
gemm_library = "onednn" if onednn_is_faster() else "torch"


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear` with the faster library.

    Args:
        hidden: `(..., inputs)`.
        weight: `(outputs, inputs)`.
        bias: `(outputs,)`.

    Returns:
        `(..., outputs)`.
    """
    # A compiled or exported model chooses the library itself, perhaps on another machine.
    is_fixed = gemm_library != "onednn" or torch.compiler.is_compiling()
    if is_fixed or not _can_use_onednn(hidden, weight, bias):
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
    """Compute `linear` with oneDNN and without a graph; float32 on the CPU, any strides."""
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
    """An `nn.Linear` that multiplies with `linear`."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `(..., inputs)` to `(..., outputs)`."""
        return linear(hidden, self.weight, self.bias)


class OneDNNConv1D(Conv1D):
    """GPT-2's linear map, with transposed weights, that multiplies with `linear`."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `(..., inputs)` to `(..., outputs)`."""
        return linear(hidden, self.weight.t(), self.bias)


def use_onednn_linear(model: ModelT) -> ModelT:
    """Make every linear map of `model` multiply with `linear`; parameters and names stay.

    Without oneDNN an `nn.Linear` does so already, and quantizers know it by its class.

    Args:
        model: changed in place.

    Returns:
        `model`.
    """
    for module in model.modules():
        if type(module) is nn.Linear and gemm_library == "onednn":
            module.__class__ = OneDNNLinear
        elif type(module) is Conv1D:
            module.__class__ = OneDNNConv1D
    return model


class DeterministicLayerNorm(nn.LayerNorm):
    """A LayerNorm whose gradients on a CPU do not depend on the number of threads."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `(..., width)` to the same shape."""
        if self.weight is None or hidden.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(hidden)
        normed: Tensor = _DeterministicLayerNormFunction.apply(
            hidden, self.weight, self.bias, self.eps
        )
        return normed


def set_layer_norms(model: nn.Module, deterministic: bool) -> None:
    """Switch every LayerNorm of `model` to `DeterministicLayerNorm`, or back to torch's.

    Args:
        model: changed in place; its tensors stay where they are.
        deterministic: which of the two classes to use.
    """
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


def move_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return tensors on a device, moved there in one copy.

    The host waits for each copy, other than those to CUDA, which are made from pinned memory.

    Args:
        tensors: all on one device.
        device: where they are wanted.
    """
    if all(tensor.device == device for tensor in tensors):
        return list(tensors)
    # Those with larger items first, so that each starts at a multiple of its item size.
    order = sorted(range(len(tensors)), key=lambda index: -tensors[index].itemsize)
    data = torch.cat([tensors[index].contiguous().flatten().view(torch.uint8) for index in order])
    moved = list(tensors)
    to_cuda = device.type == "cuda"
    data = (data.pin_memory() if to_cuda else data).to(device, non_blocking=to_cuda)
    parts = data.split([tensors[index].nbytes for index in order])
    for index, part in zip(order, parts, strict=True):
        moved[index] = part.view(tensors[index].dtype).view(tensors[index].shape)
    return moved


def run_copy_tasks(tasks: Iterable[CopyTask[ResultT]]) -> list[ResultT]:
    """Run tasks side by side, and make the copies that they ask for at the same time in one.

    In each round the tasks go on in their order. What one raises ends them all.

    Returns:
        The results of the tasks.
    """
    tasks = list(tasks)
    results: dict[int, ResultT] = {}
    answers: dict[int, Any] = dict.fromkeys(range(len(tasks)))
    while answers:
        requests: dict[int, tuple[Sequence[Tensor], torch.device]] = {}
        for index, answer in answers.items():
            try:
                requests[index] = tasks[index].send(answer)
            except StopIteration as stop:
                results[index] = stop.value
        answers = {}
        for device in {device for _, device in requests.values()}:
            members = [index for index, request in requests.items() if request[1] == device]
            moved = move_together(
                [part for index in members for part in requests[index][0]], device
            )
            parts = iter(moved)
            answers |= {index: [next(parts) for _ in requests[index][0]] for index in members}
    return [results[index] for index in range(len(tasks))]


def solve_ridge(inputs: Tensor, targets: Tensor, ridge: float = RIDGE) -> Tensor:
    """Solve ridge regression of `targets` on `inputs`, both already centered.

    By the normal equations, in float64 on the CPU, since not every device has float64.

    Args:
        inputs: `(samples, inputs)`.
        targets: `(samples, outputs)`.
        ridge: as a share of the mean variance of the inputs.

    Returns:
        Coefficients `(inputs, outputs)` in float64 on the CPU.
    """
    inputs, targets = inputs.cpu().double(), targets.cpu().double()
    gram = inputs.t() @ inputs
    penalty = ridge * gram.diagonal().mean() * torch.eye(gram.shape[0], dtype=torch.double)
    return torch.linalg.solve(gram + penalty, inputs.t() @ targets)


def solve_sparse_ridge(
    ids: Tensor, weights: Tensor, targets: Tensor, num_rows: int, ridge: float = RIDGE
) -> Tensor:
    """Fit the rows of a table of which each target is a weighted sum, by ridge regression.

    Args:
        ids: rows that each target sums, `(samples, n)`; weights of equal ids add up.
        weights: of the same shape.
        targets: `(samples, outputs)`.
        num_rows: rows of the table.
        ridge: as a share of the mean squared weight that a row has in all targets together.

    Returns:
        The table `(num_rows, outputs)` in float64 on the CPU; zero where no target reads a row.
    """
    weights, targets = weights.cpu().double(), targets.cpu().double()
    used_rows, columns = ids.cpu().unique(return_inverse=True)
    samples = torch.arange(len(ids)).unsqueeze(-1).expand(ids.shape)
    inputs = torch.sparse_coo_tensor(
        torch.stack([samples.flatten(), columns.flatten()]),
        weights.flatten(),
        (len(ids), len(used_rows)),
        check_invariants=True,
    ).coalesce()
    penalty = ridge * inputs.values().square().sum() / num_rows
    # Both forms are equal; the smaller matrix is solved.
    if len(used_rows) <= len(ids):
        gram = torch.sparse.mm(inputs.t(), inputs.to_dense())
        gram.diagonal().add_(penalty)
        solution = torch.linalg.solve(gram, torch.sparse.mm(inputs.t(), targets))
    else:
        kernel = torch.cat(
            [
                torch.sparse.mm(
                    inputs,
                    torch.zeros(len(used_rows), len(part), dtype=torch.double).scatter_add(
                        0, columns[part].t(), weights[part].t()
                    ),
                )
                for part in torch.arange(len(ids)).split(KERNEL_CHUNK_SAMPLES)
            ],
            dim=1,
        )
        kernel.diagonal().add_(penalty)
        solution = torch.sparse.mm(inputs.t(), torch.linalg.solve(kernel, targets))
    return torch.zeros(num_rows, targets.shape[1]).double().index_copy(0, used_rows, solution)


def fit_reduced_rank(inputs: Tensor, targets: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Fit the linear map of a rank that predicts `targets` from `inputs` with the least error.

    Ridge regression first; of its map those directions of the outputs remain in which its
    predictions vary most.

    Args:
        inputs: `(samples, inputs)`, centered.
        targets: `(samples, outputs)`, centered.
        rank: of the map; at most the number of outputs.

    Returns:
        Two factors `(inputs, rank)` and `(rank, outputs)` whose product is the map, in float64 on
        the CPU. The rows of the second are orthonormal.

    Source: Izenman 1975, Journal of Multivariate Analysis 5.
    """
    coefficients = solve_ridge(inputs, targets)
    predictions = inputs.cpu().double() @ coefficients
    directions = torch.linalg.eigh(predictions.t() @ predictions).eigenvectors.flip(-1)[:, :rank]
    return coefficients @ directions, directions.t()


def inverse_sqrt(matrix: Tensor, damping: float = 0.0) -> Tensor:
    """Compute the inverse square root of a symmetric positive matrix by eigendecomposition.

    Args:
        matrix: `(n, n)`; negative eigenvalues, which come from rounding, count as zero.
        damping: added to every eigenvalue.

    Returns:
        `(n, n)` in float64 on the CPU.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix.cpu().double())
    return eigenvectors * (eigenvalues.clamp_min(0) + damping).rsqrt() @ eigenvectors.t()


def symmetric_root(matrix: Tensor) -> Tensor:
    """Compute R with R Rᵀ = `matrix`, so that |xR|² is x `matrix` xᵀ.

    Args:
        matrix: `(n, n)`, symmetric, without negative eigenvalues except by rounding.

    Returns:
        `(n, n)` in the type and on the device of `matrix`; it is not symmetric itself.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix.cpu().double())
    return (eigenvectors * eigenvalues.clamp(min=0).sqrt()).to(matrix)


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


def outlier_threshold(states: Tensor) -> Tensor:
    """Return the norm `()` from which one of the states `(..., width)` is an outlier."""
    return OUTLIER_FACTOR * states.float().norm(dim=-1).median()


def inlier_mask(states: Tensor) -> Tensor:
    """Return which of the states `(..., width)` are no outliers, `(...)`."""
    return states.float().norm(dim=-1) <= outlier_threshold(states)
