"""Collective operations of several processes that train together.

Each function returns its argument where there is one process only. Where there are several, all of
them have to call it, in the same order.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Return whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_gather(tensor: Tensor) -> Tensor:
    """Concatenate the rows of all processes in the order of their ranks.

    Args:
        tensor: `(n, ...)`; n may differ between processes.

    Returns:
        `(sum of all n, ...)`.
    """
    if not is_distributed():
        return tensor
    counts = [
        torch.zeros(1, dtype=torch.long, device=tensor.device) for _ in range(dist.get_world_size())
    ]
    dist.all_gather(counts, torch.tensor([len(tensor)], device=tensor.device))
    max_count = max(int(count) for count in counts)
    padded = tensor.new_zeros(max_count, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def all_gather_strings(strings: list[str]) -> list[str]:
    """Concatenate the strings of all processes in the order of their ranks."""
    if not is_distributed():
        return strings
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, strings)
    return [string for rank_strings in gathered for string in rank_strings]


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes."""
    if is_distributed():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Average a tensor over all processes."""
    return all_reduce_sum(tensor) / dist.get_world_size() if is_distributed() else tensor


def all_reduce_max(value: float) -> float:
    """Return the largest value of all processes."""
    if not is_distributed():
        return value
    tensor = torch.tensor([value], dtype=torch.double)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


def broadcast(value: float) -> float:
    """Return the value of the first process in every process."""
    if not is_distributed():
        return value
    tensor = torch.tensor([value], dtype=torch.double)
    dist.broadcast(tensor, 0)
    return float(tensor)
