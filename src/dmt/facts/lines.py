"""Before a fact is in the book: its rows, how near is near enough, and whether it is known or contradicts another."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.facts.calibration import Calibration
from dmt.facts.drafting import draft
from dmt.facts.sentences import Fact
from dmt.facts.states import encoded
from dmt.records import Told

RATE = 0.01
"""Share of places and questions at which a row may answer although it was not asked (`Calibration.reach`)."""
LED = 5
"""A row that waits for a word of the answer before it may be so many times as far away: it cannot be met by chance."""
ANYBODY = 0.8
"""Cosine from which on, at least, a row without a subject answers."""
SAME = 0.9
"""Cosine from which on two facts about the same subject say the same thing, or contradict each other."""


@dataclass(frozen=True)
class Outcome:
    """What became of a fact that was to be written.

    Attributes:
        what: `written`; `known`, it was there already; or `replaced`, it was written and another one left for it.
        fact: the fact as it is there now.
        old: the one that it contradicted.
        before: probability of its answer before, all tokens together.
        likely: the same now, where it was written.
    """

    what: str
    fact: Told
    old: Told | None = None
    before: float = 0.0
    likely: float = 0.0


@dataclass(frozen=True)
class Line:
    """A fact as it would be written.

    Attributes:
        told: without number and rows.
        keys, values: `(tokens, width)`, one for each token of its answer.
        asks: `(width,)` the state that asks for it, as states are compared.
        before, likely: probability of its answer without and with them.
    """

    told: Told
    keys: Tensor
    values: Tensor
    asks: Tensor
    before: float
    likely: float


def lines_of(
    model: PreTrainedModel, tokenizer: Any, facts: Sequence[Fact], layers: tuple[int, int], calibration: Calibration, rate: float
) -> list[Line]:
    """`facts` as they would be written, heard and answered in `layers`; see `drafting` and `Calibration.reach`."""
    drafts: list[list[Any]] = [[] for _ in facts]
    for each in draft(model, tokenizer, facts, *layers):
        drafts[each.fact].append(each)
    keys = [torch.stack([each.key for each in group]) for group in drafts]
    reach, led = calibration.reach(torch.cat(keys), rate), calibration.reach(torch.cat(keys), LED * rate, calibration.lowest / 2)
    lines, first = [], 0
    for fact, group, states in zip(facts, drafts, keys, strict=True):
        own = led[first : first + len(group)].clone()
        own[0] = reach[first]
        first += len(group)
        told = _told(tokenizer, fact, own if fact.subject else own.clamp_min(ANYBODY))
        before, likely = (float(np.prod([getattr(each, name) for each in group])) for name in ("before", "likely"))
        values = torch.stack([each.value for each in group])
        lines.append(Line(told, states, values, calibration.compared(states[:1])[0], before, likely))
    return lines


def _told(tokenizer: Any, fact: Fact, reach: Tensor) -> Told:
    ways = {tuple(encoded(tokenizer, way, start=False)) for way in (fact.subject, " " + fact.subject) if fact.subject}
    answer = tuple(encoded(tokenizer, fact.answer, start=False))
    return Told(
        0, fact.prompt, fact.answer, fact.subject, fact.tag, fact.source, time.time(), tuple(sorted(ways)), answer,
        reach=tuple(reach.tolist()),
    )  # fmt: skip


@dataclass(eq=False)
class Entry:
    """A fact that is there, or will be when its batch is written, and the state that asks for it."""

    prompt: str
    answer: str
    asks: Tensor
    told: Told | None
    number: int = -1
    old: Told | None = None


def same_thing(entries: Sequence[Entry], line: Line) -> Entry | None:
    """Of facts about the same subject the one that is asked for in the same words, or in a state that is nearly the same."""
    for entry in entries:
        if plain(entry.prompt) == plain(line.told.prompt):
            return entry
    if not entries or not line.told.subject:
        return None
    cosines = torch.stack([entry.asks for entry in entries]) @ line.asks
    best = int(cosines.argmax())
    return entries[best] if float(cosines[best]) >= SAME else None


def plain(text: str) -> str:
    """As it is compared with others."""
    return " ".join(text.lower().split())
