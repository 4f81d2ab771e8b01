"""A few tokens, mostly a window's first, get block outputs hundreds of times as long as others: they say nothing of the rest.

In SmolLM2 one such token is 25,000 long where the median is 32. Counted like any other it would set every mean, every
variance and the whole of a squared error, so what is measured over tokens leaves such tokens out and errors weigh them less.

Source: massive activations, Sun et al. 2024, arXiv 2402.17762.
"""

from __future__ import annotations

import torch
from torch import Tensor

TIMES_MEDIAN = 10.0
"""A state longer than this many times the median is an outlier."""


def longest(states: Tensor) -> Tensor:
    """Length `()` beyond which one of these states `(..., width)` is an outlier."""
    return TIMES_MEDIAN * states.float().norm(dim=-1).median()


def ordinary(states: Tensor) -> Tensor:
    """Which of `states` `(..., width)` are no outliers: a mask `(...)`."""
    return states.float().norm(dim=-1) <= longest(states)


def share(states: Tensor, limit: Tensor) -> Tensor:
    """What each state's squared error counts `(...)`: 1, or less by the square of how much longer than `limit` it is."""
    return (limit / states.float().norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)).square().clamp(max=1)
