"""The rows of an associative memory as search sees them: a working set, derived from a store and kept in step with it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dmt.memory.heat import cooled
from dmt.memory.histories import Histories
from dmt.memory.indexes import FaissIndex
from dmt.memory.nearest import nearest, nearest_by_halves
from dmt.records import Insert, Numbers, Page, Usage

KNOWN = ("heat", "heat_step", "entries", "created", "pinned", "reads")
"""What a store knows of a row that is kept here as it stands there."""
PLAIN = ("exact", "half")
"""Ways to search that compare a query with every key."""
GROWTH = 1_024
"""Places that are made at once, at least."""


@dataclass(frozen=True)
class Found:
    """What a search gives, nearest first, all `(n, k)`.

    Attributes:
        distances: squared Euclidean distances; infinite where there was no further row.
        places: where the rows lie; meaningless where the distance is infinite.
    """

    distances: Tensor
    places: Tensor


class Rows(nn.Module):
    """Keys, values and numbers of rows at places that do not move; a place without a row has the number -1.

    Args:
        key_width: numbers in a key.
        value_width: numbers in a value.
        places: room at the start; more is made when it is needed.
        index: `exact`; `half`, exact among those that look nearest in half precision; or a kind of faiss index.
    """

    def __init__(self, key_width: int, value_width: int, places: int = 0, index: str = "exact") -> None:
        super().__init__()
        self.keys: Tensor
        self.values: Tensor
        self.ids: Tensor
        self.register_buffer("keys", torch.zeros(places, key_width))
        self.register_buffer("values", torch.zeros(places, value_width))
        self.register_buffer("ids", torch.full((places,), -1))
        self.index = index
        self._index = None if index in PLAIN else FaissIndex(index, key_width)
        self._by_halves = index == "half"
        self._halves: Tensor | None = None
        self._indexed = False
        self._handicap: Tensor | None = None
        self._places: dict[int, int] | None = None
        self._histories: Histories | None = None

    def reset(self) -> None:
        """No rows."""
        self.ids.fill_(-1)
        self._indexed = False
        self._handicap = self._halves = self._places = self._histories = None

    @property
    def places(self) -> int:
        """Rows there is room for now."""
        return len(self.ids)

    @property
    def place_of(self) -> dict[int, int]:
        """Where the row of each number lies."""
        if self._places is None:
            there = (self.ids >= 0).nonzero().flatten()
            self._places = dict(zip(self.ids[there].tolist(), there.tolist(), strict=True))
        return self._places

    def __len__(self) -> int:
        return len(self.place_of)

    @property
    def histories(self) -> Histories:
        """What is known of the rows beside keys and values."""
        if self._histories is None:
            self._histories = Histories.empty(self.places)
            self._histories.entries[(self.ids >= 0).cpu().numpy()] = 1
        return self._histories

    def search(self, queries: Tensor, k: int) -> Found:
        """The k rows whose keys are nearest to each of `queries` `(n, key width)`; by an index, rows near to it."""
        if self._index is not None and len(self) > k:
            return self._by_index(queries.detach().to(self.keys.dtype), k)
        if self._handicap is None or self._handicap.device != self.keys.device:
            self._handicap = (-self.keys.square().sum(-1) / 2).masked_fill(self.ids < 0, -torch.inf)
        asked, there = queries.detach().to(self.keys.dtype), min(k, self.places)
        with torch.autocast(self.keys.device.type, enabled=False):
            if self._by_halves:
                if self._halves is None or self._halves.device != self.keys.device:
                    self._halves = self.keys.bfloat16()
                distances, places = nearest_by_halves(asked, self.keys, self._halves, self._handicap, there)
            else:
                distances, places = nearest(asked, self.keys, self._handicap, there)
        if there == k:
            return Found(distances, places)
        more = (len(queries), k - there)
        return Found(torch.cat([distances, distances.new_full(more, torch.inf)], 1), torch.cat([places, places.new_zeros(more)], 1))

    def _by_index(self, queries: Tensor, k: int) -> Found:
        assert self._index is not None, "asked for where there is one"
        if not self._indexed:
            there = (self.ids >= 0).nonzero().flatten()
            self._index.build(self.keys[there], there)
            self._indexed = True
        found = self._index.search(queries, k)
        places = found.clamp_min(0)
        with torch.autocast(self.keys.device.type, enabled=False):
            distances = (queries.unsqueeze(1) - self.keys[places]).square().sum(-1)
        distances, order = distances.masked_fill((found < 0) | (self.ids[places] < 0), torch.inf).sort(-1)
        return Found(distances, places.gather(1, order))

    def exactly(self, queries: Tensor, k: int) -> Found:
        """`search` without an index, to tell an index's recall."""
        before = self._index, self._by_halves
        self._index, self._by_halves = None, False
        try:
            return self.search(queries, k)
        finally:
            self._index, self._by_halves = before

    @torch.no_grad()
    def put(self, part: Insert, step: int) -> Numbers:
        """Add rows and make room where there is none; their places `(n,)`."""
        count = len(part.ids)
        free = (self.ids < 0).nonzero().flatten()[:count]
        if len(free) < count:
            self._grow(count - len(free))
            free = (self.ids < 0).nonzero().flatten()[:count]
        self.keys[free] = torch.as_tensor(part.keys).to(self.keys)
        self.values[free] = torch.as_tensor(part.values).to(self.values)
        self.ids[free] = torch.as_tensor(part.ids).to(self.ids)
        if self._handicap is not None:
            self._handicap[free] = -self.keys[free].square().sum(-1) / 2
        if self._halves is not None:
            self._halves[free] = self.keys[free].to(self._halves.dtype)
        if self._indexed and self._index is not None:
            self._indexed = self._index.add(self.keys[free], free)
        at = free.cpu().numpy()
        known = self.histories
        known.heat[at], known.heat_step[at], known.reads[at], known.last_read[at] = part.heat, step, 0, 0.0
        known.used[at] = False
        known.entries[at] = 1 if part.entries is None else part.entries
        known.created[at] = 0.0 if part.created is None else part.created
        known.pinned[at] = part.pinned
        for place, tag in zip(at, [part.tag] * count if isinstance(part.tag, str) else part.tag, strict=True):
            known.tags[place] = tag
        self.place_of.update(zip(part.ids.tolist(), at.tolist(), strict=True))
        return at

    def _grow(self, by: int) -> None:
        places = -(-(self.places + max(by, GROWTH, self.places // 2)) // GROWTH) * GROWTH
        histories, more = self.histories.grown(places), places - self.places
        self.keys, self.values = (  # new pages are costly, so nothing is made twice
            torch.cat([old, _zeros(more, old)]) if self.places else _zeros(more, old) for old in (self.keys, self.values)
        )
        self.ids = torch.cat([self.ids, self.ids.new_full((more,), -1)])
        self._histories, self._handicap, self._halves = histories, None, None

    @torch.no_grad()
    def drop(self, ids: Iterable[int]) -> None:
        """Take rows out; numbers that are not there are an error.

        Raises:
            KeyError: no row has one of these numbers.
        """
        at = [self.place_of.pop(int(number)) for number in ids]
        self.ids[at] = -1
        if self._indexed and self._index is not None:
            self._indexed = self._index.remove(torch.as_tensor(at))
        if self._handicap is not None:
            self._handicap[at] = -torch.inf

    def use(self, places: Numbers, weights: NDArray[np.float64], step: int, now: float, decay: float) -> None:
        """Note that rows were read: `places` and how much each counted, both `(n,)`, a place once for each read."""
        known = self.histories
        read, first = np.unique(places, return_inverse=True)
        more = np.bincount(first, weights, len(read))
        known.heat[read] = cooled(known.heat[read], known.heat_step[read], step, decay) + more
        known.heat_step[read], known.last_read[read] = step, now
        known.reads[read] += np.bincount(first, minlength=len(read))
        known.used[read] = True

    def take_usage(self) -> Usage | None:
        """How rows have been used since this was last asked; None where none has."""
        known = self.histories
        used = ((self.ids >= 0).cpu().numpy() & known.used).nonzero()[0]
        if not len(used):
            return None
        ids = self.ids[torch.as_tensor(used, device=self.ids.device)].cpu().numpy()
        usage = Usage(ids, known.reads[used], known.last_read[used], known.heat[used].astype(np.float32), known.heat_step[used])
        known.used[used] = False
        return usage

    @torch.no_grad()
    def rebuild(self, pages: Iterable[Page], places: Numbers | None = None, expected: int = 0) -> None:
        """Hold these rows and no others, with what the store knows of them; `expected` of them, as a hint.

        With `places`, the number of the row at each place (-1 for none), they lie where they lay: sums over them are then
        the same to the last bit. A row that `places` does not name is added behind them.
        """
        self.reset()
        if expected > self.places:
            self._grow(expected - self.places)
        start = 0
        for page in pages:  # each is copied once, to where it stays
            here = slice(start, start + len(page.ids))
            if here.stop > self.places:
                self._grow(here.stop - self.places)
            known = self.histories
            for stored, read in ((self.keys, page.keys), (self.values, page.values), (self.ids, page.ids)):
                stored[here] = torch.tensor(read).to(stored) if stored.is_cuda else _as_tensor(read)
            for name in KNOWN:
                getattr(known, name)[here] = page.about[name]
            known.last_read[here] = [0.0 if when is None else when for when in page.about["last_read"]]
            known.tags[here] = page.about["tag"]
            start += len(page.ids)
        if places is not None:
            self._lay_out(places)

    def _lay_out(self, places: Numbers) -> None:
        known = self.place_of
        wanted = [int(number) for number in places]
        named = set(wanted)
        late = [number for number in known if number not in named]
        wanted += late
        at = np.array([known.get(number, -1) for number in wanted], np.int64)
        there = torch.as_tensor(at >= 0, device=self.ids.device)
        source = torch.as_tensor(at, device=self.ids.device).clamp_min(0)
        before = self.histories
        if not self.places:  # nothing to take from
            self._grow(max(1, len(wanted)))
            before, source = self.histories, source.clamp_max(0)
        self.keys = torch.where(there.unsqueeze(-1), self.keys[source], 0)
        self.values = torch.where(there.unsqueeze(-1), self.values[source], 0)
        self.ids = torch.where(there, self.ids[source], -1)
        self._histories = before.taken(np.where(at >= 0, at, 0))
        self._places = self._handicap = self._halves = None
        self._indexed = False

    def numbers(self, places: Sequence[int] | Numbers | Tensor) -> Numbers:
        """Numbers of the rows at `places`."""
        return self.ids[torch.as_tensor(places, device=self.ids.device)].cpu().numpy()


def _zeros(rows: int, like: Tensor) -> Tensor:
    """Zeros `(rows, width of like)` that take no memory before they are written to, where the system can do that."""
    if like.is_cuda or like.dtype != torch.float32:
        return like.new_zeros(rows, like.shape[1])
    return torch.from_numpy(np.zeros((rows, like.shape[1]), np.float32))


def _as_tensor(read: NDArray[np.generic]) -> Tensor:
    """An array that may be bytes of a database, as a tensor that is only read from."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(read)
