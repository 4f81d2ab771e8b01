"""Which rows a bounded memory can do without: LRFU, between least recently and least frequently used."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]


def cooled(heat: Floats, since: Numbers, now: int, decay: float) -> Floats:
    """Heat as of step `now` of rows whose heat was `heat` at the steps `since`; it halves every `1 / decay` steps.

    With `decay` 0 heat is the number of uses, so the least frequently used is coldest; with 1 a use is worth more than
    all earlier ones together, so the least recently used is.

    Source: the combined recency and frequency of Lee et al. 2001, "LRFU: a spectrum of policies that subsumes the least
        recently used and least frequently used policies", with F(x) = 2^(-decay x).
    """
    return heat * np.exp2(-decay * (now - since))


def coldest(heat: Floats, since: Numbers, now: int, decay: float, count: int) -> Numbers:
    """Indices of the `count` coldest rows, coldest first; of equally cold ones the earlier."""
    # In logarithms, since heat long unread would round to nothing and all such rows look alike.
    with np.errstate(divide="ignore"):
        order = np.log2(heat) - decay * (now - since.astype(np.float64))
    return np.argsort(order, kind="stable")[:count].astype(np.int64)
