"""Several processes, one memory: what each would write is gathered, so that all hold the same rows."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_gather(tensor: Tensor) -> Tensor:
    """Rows `(n, ...)` of all processes, in the order of their ranks; n may differ. All have to call it, in the same order."""
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
    """Words of all processes, in the order of their ranks."""
    if not is_distributed():
        return strings
    encoded = torch.frombuffer(
        bytearray("\0".join(strings).encode()) or bytearray(1), dtype=torch.uint8
    )
    lengths = all_gather(torch.tensor([[len(encoded), len(strings)]]))
    all_encoded = all_gather(encoded)
    all_strings: list[str] = []
    start = 0
    for length, count in lengths.tolist():
        decoded = bytes(all_encoded[start : start + length].tolist()).decode()
        all_strings += decoded.split("\0")[:count]
        start += length
    return all_strings


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, for all of them; itself where there is one."""
    if is_distributed():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all processes, for all of them."""
    return all_reduce_sum(tensor) / dist.get_world_size() if is_distributed() else tensor


def all_reduce_max(value: float) -> float:
    """The largest of what all processes have, for all."""
    if not is_distributed():
        return value
    tensor = torch.tensor([value], dtype=torch.double)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


def broadcast(value: float) -> float:
    """What the first process has, for all."""
    if not is_distributed():
        return value
    tensor = torch.tensor([value], dtype=torch.double)
    dist.broadcast(tensor, 0)
    return float(tensor)
