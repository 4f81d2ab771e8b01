"""Known phrases in a stream of token ids: who is being talked about, and what has just been said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PRIME = 1_000_003
"""Base of the hash; products wrap around, and what it finds is compared token by token."""

AGAIN = 16
"""Tokens for which what has been said counts as said not long ago."""


class Spotter:
    """Finds every place where one of many known phrases ends, all at once.

    Args:
        phrases: token ids of each; none of them empty.
    """

    def __init__(self, phrases: Sequence[Sequence[int]] = ()) -> None:
        self._by_length: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for length in sorted({len(phrase) for phrase in phrases}):
            numbers = [number for number, phrase in enumerate(phrases) if len(phrase) == length]
            ids = torch.tensor([list(phrases[number]) for number in numbers], dtype=torch.long).view(len(numbers), length)
            hashes, order = _hashed(ids).sort(stable=True)
            self._by_length[length] = hashes, ids[order], torch.tensor(numbers)[order]
        self.lengths = torch.tensor([len(phrase) for phrase in phrases], dtype=torch.long)
        self.longest = max(self._by_length, default=0)
        """Tokens of the longest phrase."""

    def ends(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sequence, position of the last token, and number of each phrase found in token ids `(batch, time)`; all `(n,)`."""
        tokens = tokens.cpu()
        found = [torch.zeros(3, 0, dtype=torch.long)]
        for length, (hashes, ids, numbers) in self._by_length.items():
            if tokens.shape[1] < length:
                continue
            pieces = tokens.unfold(1, length, 1)  # (batch, time - length + 1, length)
            asked = _hashed(pieces).contiguous()
            first, last = (torch.searchsorted(hashes, asked, right=right) for right in (False, True))
            sequence, start = (last > first).nonzero(as_tuple=True)
            there, many = first[sequence, start], (last - first)[sequence, start]
            # Several phrases may share a hash, most often because they are equal.
            each = torch.arange(len(many)).repeat_interleave(many)
            which = there[each] + torch.arange(len(each)) - (many.cumsum(0) - many)[each]
            same = (ids[which] == pieces[sequence[each], start[each]]).all(-1)
            each, which = each[same], which[same]
            found.append(torch.stack([sequence[each], start[each] + length - 1, numbers[which]]))
        sequences, positions, whose = torch.cat(found, dim=1)
        return sequences, positions, whose


def _hashed(ids: Tensor) -> Tensor:
    powers = torch.tensor([pow(PRIME, power, 2**62) for power in range(ids.shape[-1])])
    return ((ids + 1) * powers).sum(-1)


@dataclass(frozen=True)
class Spotted:
    """What a pass over token ids `(batch, time)` is told of its text, places being numbered `sequence * time + position`.

    Attributes:
        places: `(m,)` places at which a subject has been named, not long ago.
        subjects: `(m,)` which; a place has several where several were named.
        ago: `(m,)` tokens since it was named last.
        led: `(l,)` places at which a lead has just been said.
        leads: `(l,)` which.
        since: `(s,)` places at which one has been said not long ago.
        spent: `(s,)` which.
    """

    places: Tensor
    subjects: Tensor
    ago: Tensor
    led: Tensor
    leads: Tensor
    since: Tensor
    spent: Tensor


def _longest(phrases: Spotter, sequences: Tensor, positions: Tensor, numbers: Tensor, time: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of phrases found that end at the same place the longest: who names New York has not named York."""
    if not len(numbers):
        return sequences, positions, numbers
    ends = sequences * time + positions
    places, group = ends.unique(return_inverse=True)
    longest = torch.zeros(len(places), dtype=torch.long).scatter_reduce(0, group, phrases.lengths[numbers], "amax")
    kept = phrases.lengths[numbers] == longest[group]
    return sequences[kept], positions[kept], numbers[kept]


def spot(
    tokens: Tensor,
    new: int,
    subjects: Spotter,
    subject_of: Tensor,
    leads: Spotter,
    window: int,
    end: int | Sequence[int] | None = None,
) -> Spotted:
    """Who has been named and what has just been said at each of the `new` last tokens of `(batch, time)`.

    Args:
        subjects: its phrases are names; `subject_of` `(phrases,)` says whose.
        window: tokens for which a subject is talked about after it was named.
        end: token id that ends a document, or several; what was named or said before is not after it.
    """
    time = tokens.shape[1]
    sequences, positions, numbers = _longest(subjects, *subjects.ends(tokens), time)
    ends = torch.tensor([] if end is None else end, device=tokens.device)
    documents = torch.isin(tokens, ends).cumsum(1).cpu()
    steps = torch.arange(window)
    at = positions.unsqueeze(1) + steps  # (named, window)
    there = (at < time) & (at >= time - new)
    at = at.clamp_max(time - 1)
    there &= documents[sequences.unsqueeze(1), at] == documents[sequences, positions].unsqueeze(1)
    named, ago = there.nonzero(as_tuple=True)
    place = sequences[named] * new + at[named, ago] - (time - new)
    subject = subject_of[numbers[named]] if len(numbers) else numbers
    if len(place):  # of several times the last
        order = ago.argsort(stable=True)
        pairs = torch.stack([place, subject], dim=1)[order]
        kept, group = pairs.unique(dim=0, return_inverse=True)
        latest = torch.full((len(kept),), window).scatter_reduce(0, group, ago[order], "amin")
        place, subject, ago = kept[:, 0].contiguous(), kept[:, 1].contiguous(), latest
    sequences, positions, lead = leads.ends(tokens)
    first = time - new  # of the new ones
    late = positions >= first
    led = sequences[late] * new + positions[late] - first
    after = positions.unsqueeze(1) + torch.arange(AGAIN)
    there = (after >= first) & (after < time)
    there &= documents[sequences.unsqueeze(1), after.clamp_max(time - 1)] == documents[sequences, positions].unsqueeze(1)
    said, steps = there.nonzero(as_tuple=True)
    since = sequences[said] * new + after[said, steps] - first
    return Spotted(place, subject, ago, led, lead[late], since, lead[said])
