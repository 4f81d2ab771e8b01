"""Facts: rows that answer in full where they are asked, and not at all elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmt.memory.spotting import Spotted

NOBODY = -1
"""Subject of a row that answers whoever is talked about; lead of one that needs no word before it."""
PAIRS = 400_000
"""Pairs of token and row compared at once."""


@dataclass(frozen=True)
class FactRows:
    """Rows of one layer, arrays over the same `n` rows.

    Attributes:
        ids: numbers of the rows.
        keys: `(n, width)` hidden states in which they were written.
        values: `(n, width)` what they add to the block's answer.
        reach: cosine between key and query from which on they answer.
        subjects: who has to have been named, or `NOBODY`.
        leads: what has to have been said just before, or `NOBODY`.
        answers: the whole answer, numbered like leads; a row without a lead does not begin it again when it has just been said.
    """

    ids: Tensor
    keys: Tensor
    values: Tensor
    reach: Tensor
    subjects: Tensor
    leads: Tensor
    answers: Tensor

    @classmethod
    def none(cls, width: int) -> FactRows:
        """No rows."""
        nobody = torch.zeros(0, dtype=torch.long)
        return cls(nobody, torch.zeros(0, width), torch.zeros(0, width), torch.zeros(0), nobody, nobody, nobody)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Answered:
    """Which rows answered in one pass, all `(n,)`: places of tokens, places of rows, cosines."""

    tokens: Tensor
    rows: Tensor
    cosines: Tensor


class FactMemory(nn.Module):
    """Adds the value of one row, or nothing, to what a block says.

    A row answers a token when three things hold: its subject has been named not long before; the words that lead to it
    have just been said or, where none do, its whole answer has not; and the hidden state is near enough to the one it was
    written in. Of several the one with a lead goes first, then the one whose subject was named last, then the nearest. A
    token's answer depends on itself and what stands before it alone.

    Nearness is the cosine of hidden states less their mean, in a metric that weighs directions in which states of prose
    vary, or in which one question asked in several ways varies, the less the more they do (`facts/calibration.py`).

    Args:
        width: size of a hidden state.
        mean: `(width,)`.
        metric: `(width, width)`; a state `x` is compared as `(x - mean) @ metric`.

    Source: a codebook with a radius to each entry, Hartvigsen et al. 2023, arXiv 2211.11031. That a row knows by name
        whom it is about, and adds to the block's answer instead of replacing it, is ours.
    """

    def __init__(self, width: int, mean: Tensor | None = None, metric: Tensor | None = None) -> None:
        super().__init__()
        self.width = width
        self.mean: Tensor
        self.metric: Tensor
        self.register_buffer("mean", torch.zeros(width) if mean is None else mean, persistent=False)
        self.register_buffer("metric", torch.eye(width) if metric is None else metric, persistent=False)
        self.asked: list[Answered] | None = None
        """Where somebody sets a list, the answers of each pass are noted in it."""
        self.hold(FactRows.none(width))

    def hold(self, rows: FactRows) -> None:
        """Have these rows and no others."""
        device = self.mean.device
        self.rows = FactRows(**{name: tensor.to(device) for name, tensor in vars(rows).items()})
        self._keys = self.compared(self.rows.keys)
        order = self.rows.subjects.argsort(stable=True)
        self._by_subject = order  # rows in the order of their subjects, those of nobody first
        self._subjects = self.rows.subjects[order]
        self._anyone = order[self._subjects == NOBODY]

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        full = {name: tensor for name, tensor in self.named_buffers() if tensor.dtype == torch.float32}
        moved = super()._apply(fn, recurse)
        for name, tensor in full.items():  # of a model in half precision too: near enough is measured in full
            setattr(self, name, tensor.to(getattr(self, name).device))
        self.hold(self.rows)
        return moved

    def compared(self, hidden: Tensor) -> Tensor:
        """Hidden states `(n, width)` as they are compared: unit vectors of the same shape, in full precision."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.normalize((hidden.float() - self.mean) @ self.metric, dim=-1)

    def add(self, said: Tensor, found: Answered) -> Tensor:
        """`said` `(..., width)` and the values of the rows found; `said` itself where there are none."""
        if self.asked is not None:
            self.asked.append(found)
        if not len(found.tokens):
            return said
        flat = said.reshape(-1, self.width)
        return flat.index_add(0, found.tokens, self.rows.values[found.rows].to(flat.dtype)).view_as(said)

    @torch.no_grad()
    def find(self, hidden: Tensor, spotted: Spotted) -> Answered:
        """Which row answers which of `hidden` `(tokens, width)`; a token has one answer at most."""
        if not len(self.rows):
            nobody = torch.zeros(0, dtype=torch.long, device=hidden.device)
            return Answered(nobody, nobody, torch.zeros(0, device=hidden.device))
        asked = [self._of_subjects(hidden, spotted), self._of_nobody(hidden, spotted)]
        tokens, rows, cosines, ago = (torch.cat(each) for each in zip(*asked, strict=True))
        # Least important first, so that the last of each token is the one that answers.
        order = cosines.argsort(stable=True)
        order = order[ago[order].argsort(stable=True, descending=True)]
        order = order[(self.rows.leads[rows[order]] != NOBODY).long().argsort(stable=True)]
        order = order[tokens[order].argsort(stable=True)]
        last = torch.ones(len(order), dtype=torch.bool, device=order.device)
        last[:-1] = tokens[order][1:] != tokens[order][:-1]
        kept = order[last]
        return Answered(tokens[kept], rows[kept], cosines[kept])

    def _of_subjects(self, hidden: Tensor, spotted: Spotted) -> tuple[Tensor, ...]:
        """Tokens, rows, cosines and how long ago the subject was named: all that are near enough."""
        device = hidden.device
        subjects = spotted.subjects.to(device).contiguous()
        first, last = (torch.searchsorted(self._subjects, subjects, right=right) for right in (False, True))
        many = last - first
        each = torch.arange(len(many), device=device).repeat_interleave(many)
        rows = self._by_subject[first[each] + torch.arange(len(each), device=device) - (many.cumsum(0) - many)[each]]
        tokens, ago = spotted.places.to(device)[each], spotted.ago.to(device)[each]
        return self._near_enough(hidden, tokens, rows, ago, spotted)

    def _of_nobody(self, hidden: Tensor, spotted: Spotted) -> tuple[Tensor, ...]:
        """The same of rows without a subject: for each token the nearest that may speak."""
        device = hidden.device
        rows = self._anyone
        free, led = rows[self.rows.leads[rows] == NOBODY], rows[self.rows.leads[rows] != NOBODY]
        tokens, places = [], []
        if len(free):
            queries = self.compared(hidden)
            best, nearby = hidden.new_full((len(hidden),), -torch.inf).float(), torch.zeros_like(free[:1]).expand(len(hidden))
            for these in free.split(max(1, PAIRS // len(hidden))):
                cosines = queries @ self._keys[these].t()  # each row has a reach of its own: not the nearest of all
                silent = cosines < self.rows.reach[these]
                over = torch.isin(self.rows.answers[these], spotted.spent.to(device)).nonzero().flatten()
                silent[:, over] |= self._spent(torch.arange(len(hidden), device=device).unsqueeze(1), these[over], spotted)
                cosines, at = cosines.masked_fill(silent, -torch.inf).max(1)
                nearby = torch.where(cosines > best, these[at], nearby)
                best = best.maximum(cosines)
            spoken = best.isfinite().nonzero().flatten()
            tokens.append(spoken)
            places.append(nearby[spoken])
        for place, lead in zip(spotted.led.tolist(), spotted.leads.tolist(), strict=True):
            these = led[self.rows.leads[led] == lead]
            tokens.append(torch.full_like(these, place))
            places.append(these)
        empty = torch.zeros(0, dtype=torch.long, device=device)
        at, which = torch.cat([empty, *tokens]), torch.cat([empty, *places])
        return self._near_enough(hidden, at, which, torch.full_like(at, torch.iinfo(torch.long).max), spotted)

    def _near_enough(self, hidden: Tensor, tokens: Tensor, rows: Tensor, ago: Tensor, spotted: Spotted) -> tuple[Tensor, ...]:
        leads = self.rows.leads[rows]
        just = _paired(spotted.led.to(rows.device), spotted.leads.to(rows.device))
        kept = torch.where(leads == NOBODY, ~self._spent(tokens, rows, spotted), torch.isin(_paired(tokens, leads), just))
        tokens, rows, ago = tokens[kept], rows[kept], ago[kept]
        places, asked = tokens.unique(return_inverse=True)
        queries = self.compared(hidden[places])
        cosines = torch.cat(
            [hidden.new_zeros(0).float()]
            + [(queries[a] * self._keys[r]).sum(-1) for a, r in zip(asked.split(PAIRS), rows.split(PAIRS), strict=True)]
        )
        near = cosines >= self.rows.reach[rows]
        return tokens[near], rows[near], cosines[near], ago[near]

    def _spent(self, tokens: Tensor, rows: Tensor, spotted: Spotted) -> Tensor:
        """Whether all that a row's fact answers has been said not long before the token; the two are broadcast."""
        spent = _paired(spotted.since.to(rows.device), spotted.spent.to(rows.device))
        return torch.isin(_paired(tokens, self.rows.answers[rows]), spent)

    def extra_repr(self) -> str:
        return f"width={self.width}, rows={len(self.rows)}"


def _paired(places: Tensor, leads: Tensor) -> Tensor:
    """One number for each pair of a place and a lead."""
    return places * 2**32 + leads
