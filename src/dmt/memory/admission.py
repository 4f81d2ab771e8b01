"""Which of the rows offered to a bounded memory come in, as what, and who leaves for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmt.memory.heat import coldest, cooled
from dmt.memory.nearest import SCORES
from dmt.memory.rows import Rows
from dmt.records import Changes, Floats, Insert, Numbers


@dataclass(frozen=True)
class Policy:
    """How a memory is kept small.

    Attributes:
        novelty: distance up to which an offered row is known already and left out.
        recombine: distance up to which it is merged into the row it is near to; nothing is where it is not over `novelty`.
        capacity: most rows held.
        decay: LRFU's, from 0 (frequency) to 1 (recency); heat halves every `1 / decay` steps.
    """

    novelty: float
    recombine: float
    capacity: int
    decay: float


@dataclass(frozen=True)
class Admitted:
    """What came of a step's offers.

    Attributes:
        changes: what is to be written down.
        alone: numbers of the rows that are one offer as it was made, `(n,)`.
        offers: which offer each of those was, `(n,)`.
    """

    changes: Changes
    alone: Numbers
    offers: Numbers


@torch.no_grad()
def admit(
    rows: Rows,
    keys: Tensor,
    values: Tensor,
    tags: Sequence[str],
    policy: Policy,
    step: int,
    now: float,
    take_ids: Callable[[int], Numbers],
) -> Admitted:
    """Let in what is new among `keys` `(n, key width)` and `values` `(n, value width)`; `rows` are changed.

    In the order offered: what is within `novelty` of a row is left out, what is within `recombine` merged into it (the
    mean weighted by entries, tags joined, the oldest creation kept, under a new number; a pinned row stays as it is), the
    rest comes in, and of those offered together the first stands for the ones near it. Over `capacity` the coldest
    that are not pinned leave; where only pinned rows are left, the earliest offered stay out.

    Raises:
        ValueError: a number is not finite; nothing has changed.
    """
    if not (torch.isfinite(keys).all() and torch.isfinite(values).all()):
        raise ValueError("keys and values of a memory must be finite")
    if not len(keys):
        return Admitted(Changes(), np.empty(0, np.int64), np.empty(0, np.int64))
    found = rows.search(keys, 1)
    far, near = found.distances[:, 0].double().sqrt(), rows.numbers(found.places[:, 0]) if rows.places else None
    leaders, apart = _leaders(keys, far, policy)
    merged: dict[int, list[int]] = {}  # row number: offers that join it
    fresh: dict[int, list[int]] = {}  # offer that leads: offers that join it
    for offer, distance in enumerate(far.tolist()):
        if distance <= policy.novelty:
            continue
        if distance <= policy.recombine:
            assert near is not None, "something was near"
            if not rows.histories.pinned[rows.place_of[int(near[offer])]]:
                merged.setdefault(int(near[offer]), []).append(offer)
        elif leaders[offer] == offer:
            fresh[offer] = [offer]
        elif apart[offer] > policy.novelty:
            fresh[leaders[offer]].append(offer)
    inserts, removals = [], []
    if merged:
        inserts.append(_merge(rows, merged, keys, values, tags, step, now, policy.decay, take_ids))
        removals.append((np.array(list(merged), np.int64), "merged"))
        rows.drop(merged)
        rows.put(inserts[-1], step)
    room = policy.capacity - len(rows)
    if len(fresh) > room:
        leaving = _coldest(rows, len(fresh) - room, step, policy.decay)
        rows.drop(leaving)
        removals.append((leaving, "evicted"))
        late = len(fresh) - (policy.capacity - len(rows))
        fresh = dict(list(fresh.items())[max(0, late) :])
    if fresh:
        inserts.append(_new(fresh, keys, values, tags, now, take_ids))
        rows.put(inserts[-1], step)
    single = [place for place, members in enumerate(fresh.values()) if len(members) == 1]
    alone = inserts[-1].ids[single] if fresh else np.empty(0, np.int64)
    offers = np.array(list(fresh), np.int64)[single] if fresh else np.empty(0, np.int64)
    return Admitted(Changes(inserts, [each for each in removals if len(each[0])]), alone, offers)


def _leaders(keys: Tensor, far: Tensor, policy: Policy) -> tuple[list[int], list[float]]:
    """For each offer that no stored row is near to, the first such offer that stands for it, and how far that is."""
    reach = max(policy.novelty, policy.recombine)
    leaders, apart = list(range(len(keys))), [0.0] * len(keys)
    outside = (far > reach).nonzero().flatten()
    asked, numbers = keys[outside].double(), outside.tolist()
    taken = np.zeros(len(numbers), bool)
    width = max(1, SCORES // max(1, len(numbers)))
    for start in range(0, len(numbers), width):
        distances = torch.cdist(asked[start : start + width], asked).cpu().numpy()
        for at, to in enumerate(distances, start):
            if taken[at]:
                continue
            for other in ((to <= reach) & ~taken).nonzero()[0]:
                taken[other] = True
                leaders[numbers[other]], apart[numbers[other]] = numbers[at], float(to[other])
    return leaders, apart


def _coldest(rows: Rows, count: int, step: int, decay: float) -> Numbers:
    """Numbers of the `count` coldest rows that are not pinned, or of as many as there are."""
    known = rows.histories
    there = ((rows.ids >= 0).cpu().numpy() & ~known.pinned).nonzero()[0]
    there = there[np.argsort(rows.numbers(there), kind="stable")]  # of equally cold ones the oldest leaves
    return rows.numbers(there[coldest(known.heat[there], known.heat_step[there], step, decay, count)])


def _new(
    fresh: dict[int, list[int]], keys: Tensor, values: Tensor, tags: Sequence[str], now: float, take_ids: Callable[[int], Numbers]
) -> Insert:
    mean_keys, mean_values = (torch.stack([states[members].mean(0) for members in fresh.values()]) for states in (keys, values))
    entries = np.array([len(members) for members in fresh.values()], np.int64)
    joined = [join_tags(tags[member] for member in members) for members in fresh.values()]
    created = [now] * len(fresh)
    heat = entries.astype(np.float32)
    return Insert(take_ids(len(fresh)), _numpy(mean_keys), _numpy(mean_values), heat, joined, entries, created)


def _merge(
    rows: Rows,
    merged: dict[int, list[int]],
    keys: Tensor,
    values: Tensor,
    tags: Sequence[str],
    step: int,
    now: float,
    decay: float,
    take_ids: Callable[[int], Numbers],
) -> Insert:
    at = np.array([rows.place_of[number] for number in merged])
    known = rows.histories
    more = np.array([len(members) for members in merged.values()], np.int64)
    entries = known.entries[at] + more
    means = []
    joining = torch.tensor([offer for members in merged.values() for offer in members], device=keys.device)
    into = torch.arange(len(merged)).repeat_interleave(torch.as_tensor(more)).to(keys.device)
    for stored, offered in ((rows.keys, keys), (rows.values, values)):
        sums = offered.new_zeros(len(merged), offered.shape[1], dtype=torch.double)
        sums.index_add_(0, into, offered[joining].double())
        held, now_held = (torch.as_tensor(number, device=keys.device).unsqueeze(-1) for number in (known.entries[at], entries))
        means.append((stored[torch.as_tensor(at)].double() * held + sums) / now_held)
    joined = [
        join_tags([known.tags[place], *(tags[m] for m in members)]) for place, members in zip(at, merged.values(), strict=True)
    ]
    heat = cooled(known.heat[at], known.heat_step[at], step, decay) + more
    created = [float(known.created[place]) for place in at]
    numbers = take_ids(len(merged))
    return Insert(numbers, _numpy(means[0]), _numpy(means[1]), heat.astype(np.float32), joined, entries, created)


def join_tags(tags: Iterable[str]) -> str:
    """One tag for a row that several tags led to: each once, a line each, in the order they came."""
    lines = [line for tag in tags for line in tag.split("\n") if line]
    return "\n".join(dict.fromkeys(lines))


def _numpy(states: Tensor) -> Floats:
    return states.float().cpu().numpy()
