"""What slots that are not read would have said, as far as it can be foreseen."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-3
"""Ridge of the linear forecast, as a share of the mean variance of the hidden state."""


def linear_forecast(hidden: Tensor, wanted: Tensor) -> Tensor:
    """The matrix `(width, width)` that best foretells `wanted` from `hidden`, both `(tokens, width)`, about their means.

    Source: ridge regression by its normal equations, in doubles, on the CPU, for not every device has doubles.
    """
    spread, answer = ((states - states.mean(0)).cpu().double() for states in (hidden, wanted))
    square = spread.t() @ spread
    ridge = RIDGE * square.diagonal().mean() * torch.eye(square.shape[0], dtype=torch.double)
    return torch.linalg.solve(square + ridge, spread.t() @ answer).t().to(hidden)
