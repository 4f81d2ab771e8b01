"""From scores to the weights of slots: the functions a memory can choose from."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Pointwise = Callable[[Tensor], Tensor]


def _gelu_tanh(scores: Tensor) -> Tensor:
    return F.gelu(scores, approximate="tanh")


# `gelu_new` is the tanh form written out in five kernels; the fused one is the same function and several times faster.
ACTIVATIONS: dict[str, Pointwise] = {
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
}


def pointwise(weighting: str, activation: str) -> Pointwise | None:
    """The function of one score that gives its slot's weight; None where weights depend on each other.

    Raises:
        ValueError: the block replaced has an activation that is not in `ACTIVATIONS`.
    """
    if weighting in ("softmax", "distance"):
        return None
    name = "relu" if weighting == "relu" else activation
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not supported; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def normalised(scores: Tensor, selected: Tensor) -> Tensor:
    """Softmax of `scores` over the selected slots `(..., slots)`; zero elsewhere."""
    return torch.softmax(scores.masked_fill(~selected, float("-inf")), dim=-1)
