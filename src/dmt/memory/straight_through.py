"""Gradients through a search, which has none: straight through, from what came back to what was asked and what was kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Returned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, kept_keys: Tensor, kept_values: Tensor, keys: Tensor, values: Tensor, origin: Tensor
    ) -> Any:
        ctx.save_for_backward(origin)
        ctx.kept = kept_keys.shape, kept_values.shape
        return keys.clone(), values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (origin,) = ctx.saved_tensors
        of_keys, of_values = gradients
        came_back = origin >= 0
        kept = []
        for shape, gradient in zip(ctx.kept, gradients, strict=True):
            kept.append(gradient.new_zeros(shape).index_add(0, origin[came_back], gradient[came_back]))
        return of_keys.sum(1), kept[0], kept[1], of_keys, of_values, None


def returned(
    queries: Tensor, kept_keys: Tensor, kept_values: Tensor, keys: Tensor, values: Tensor, origin: Tensor
) -> tuple[Tensor, Tensor]:
    """`keys` and `values` as they came out of a store, with a gradient for those who had a part in them.

    A search cannot be differentiated. A key that comes back is the query plus noise, and also the key once inserted
    plus noise; so each query receives the sum of the gradients of the keys returned to it, an inserted key the gradient
    of the key it came back as, an inserted value that of the value.

    Args:
        queries: what was asked, `(n, key width)`.
        kept_keys, kept_values: what has been inserted, `(m, key width)` and `(m, value width)`, computed once more with
            the weights of now.
        keys, values: what came back, `(n, k, key width)` and `(n, k, value width)`.
        origin: `(n, k)`, which of the m each came from; -1 where it is none of them.

    Source: straight-through estimation, Bengio et al. 2013, arXiv 1308.3432, applied to a store that is searched.
    """
    return _Returned.apply(queries, kept_keys, kept_values, keys, values, origin)  # type: ignore[no-any-return,no-untyped-call]
