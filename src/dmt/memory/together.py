"""Several processes, one memory: what each would write is gathered, so that all hold the same rows."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def several() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gathered(mine: Tensor) -> Tensor:
    """Rows `(n, ...)` of all processes, in the order of their ranks; n may differ. All have to call it, in the same order."""
    if not several():
        return mine
    counts = [torch.zeros(1, dtype=torch.long, device=mine.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(mine)], device=mine.device))
    longest = max(int(count) for count in counts)
    padded = mine.new_zeros(longest, *mine.shape[1:])
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def gathered_words(mine: list[str]) -> list[str]:
    """Words of all processes, in the order of their ranks."""
    if not several():
        return mine
    joined = torch.frombuffer(bytearray("\0".join(mine).encode()) or bytearray(1), dtype=torch.uint8)
    lengths = gathered(torch.tensor([[len(joined), len(mine)]]))
    everything = gathered(joined)
    words: list[str] = []
    start = 0
    for length, count in lengths.tolist():
        part = bytes(everything[start : start + length].tolist()).decode()
        words += part.split("\0")[:count]
        start += length
    return words


def summed(mine: Tensor) -> Tensor:
    """The sum of a tensor over all processes, for all of them; itself where there is one."""
    if several():
        mine = mine.clone()
        dist.all_reduce(mine)
    return mine


def averaged(mine: Tensor) -> Tensor:
    """The mean of a tensor over all processes, for all of them."""
    return summed(mine) / dist.get_world_size() if several() else mine


def largest(number: float) -> float:
    """The largest of what all processes have, for all."""
    if not several():
        return number
    told = torch.tensor([number], dtype=torch.double)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return float(told)


def agreed(number: float) -> float:
    """What the first process has, for all."""
    if not several():
        return number
    told = torch.tensor([number], dtype=torch.double)
    dist.broadcast(told, 0)
    return float(told)
