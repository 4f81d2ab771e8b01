"""Matrix products by the faster of torch's two libraries.

torch multiplies float32 matrices on a CPU with MKL, which uses no AVX-512 on processors that are not Intel's: there oneDNN,
which torch carries too, is twice as fast and reads a matrix for a single token at the memory's full speed
(`benchmarks/products.py`). Same sums in another order: results differ in the last digits. Which library is used depends on
the machine and on shapes alone, so that a run repeated on the same machine gives the same numbers.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST = 500_000
"""Multiplications from which a call of oneDNN, slower to begin, pays."""


def processor(field: str = "model name") -> str:
    """What Linux says of the processor, its `model name` or `vendor_id`; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def onednn_is_faster() -> bool:
    """Whether this is a processor on which MKL leaves half of the speed unused, and oneDNN is there to use it."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return both and wide and "intel" not in processor("vendor_id").lower() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


library = "onednn" if onednn_is_faster() else "torch"
"""What multiplies float32 matrices on the CPU: `onednn`, or `torch` for whatever torch takes."""


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`hidden (..., inputs)` times `weight (outputs, inputs)` transposed, plus `bias (outputs,)`: as `F.linear`."""
    if library != "onednn" or not _suits(hidden, weight, bias):
        return F.linear(hidden, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
        product: Tensor = _Linear.apply(hidden, weight, bias)
        return product
    return onednn(hidden, weight, bias)


def _suits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    plain = all(t is None or (t.dtype == torch.float32 and t.device.type == "cpu") for t in (hidden, weight, bias))
    large = hidden.dim() > 1 and hidden.numel() * len(weight) >= LEAST
    return plain and large and not torch.is_autocast_enabled("cpu")


def onednn(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` by oneDNN, without a graph; float32 on the CPU, any strides."""
    return torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return onednn(hidden, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        flat, given = upstream.flatten(0, -2), hidden.flatten(0, -2)
        back = onednn(upstream, weight.t()) if wanted[0] else None
        learnt = onednn(flat.t(), given.t()) if wanted[1] else None
        return back, learnt, flat.sum(0) if wanted[2] else None


class QuickLinear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, hidden: Tensor) -> Tensor:
        """`(..., inputs)` to `(..., outputs)`."""
        return linear(hidden, self.weight, self.bias)
