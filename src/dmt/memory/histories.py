"""What is known of stored rows beside keys and values: how warm, how old, how often read, who is pinned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmt.records import Numbers


@dataclass
class Histories:
    """What is known of each place's row beside key and value: arrays over all places."""

    heat: NDArray[np.float64]
    heat_step: Numbers
    reads: Numbers
    last_read: NDArray[np.float64]
    entries: Numbers
    created: NDArray[np.float64]
    pinned: NDArray[np.bool_]
    used: NDArray[np.bool_]  # since usage was last taken
    tags: list[str]

    @classmethod
    def empty(cls, places: int) -> Histories:
        """Of places that hold no rows."""
        return cls(
            heat=np.zeros(places), heat_step=np.zeros(places, np.int64), reads=np.zeros(places, np.int64),
            last_read=np.zeros(places), entries=np.zeros(places, np.int64), created=np.zeros(places),
            pinned=np.zeros(places, bool), used=np.zeros(places, bool), tags=[""] * places,
        )  # fmt: skip

    def taken(self, at: Numbers) -> Histories:
        """Those at the places `at`, in this order."""
        arrays = {name: mine[at].copy() for name, mine in vars(self).items() if isinstance(mine, np.ndarray)}
        return Histories(**arrays, tags=[self.tags[place] for place in at])

    def grown(self, places: int) -> Histories:
        """The same, with room for more."""
        more = Histories.empty(places - len(self.tags))
        arrays = {
            name: np.concatenate([mine, getattr(more, name)]) for name, mine in vars(self).items() if isinstance(mine, np.ndarray)
        }
        return Histories(**arrays, tags=self.tags + more.tags)
