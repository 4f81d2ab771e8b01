"""Before a fact is in the book: its rows, how near is near enough, and whether it is known or contradicts another."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.errors import UserError
from dmt.facts.calibration import Calibration
from dmt.facts.drafting import draft
from dmt.facts.sentences import Fact
from dmt.facts.states import encoded
from dmt.memory.spotting import Spotter
from dmt.models.overlay import WINDOW
from dmt.records import Told

RATE = 0.01
"""Share of places and questions at which a row may answer although it was not asked (`Calibration.reach`)."""
LED = 5
"""A row that waits for a word of the answer before it may be so many times as far away: it cannot be met by chance."""
ANYBODY = 0.8
"""Cosine from which on, at least, a row without a subject answers."""
SAME = 0.8
"""Cosine from which on two facts about the same subject say the same thing, or contradict each other: safely above what two
different questions about somebody have, so that nothing is replaced that should not be (EXPERIMENTS.md, "Facts")."""


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
    """`facts` as they would be written, heard and answered in `layers`; see `drafting` and `Calibration.reach`.

    Raises:
        UserError: a fact is too long for the model, or would not know its own prompt.
    """
    for fact in facts:
        _check_named(tokenizer, fact)
    drafts: list[list[Any]] = [[] for _ in facts]
    for each in draft(model, tokenizer, facts, *layers):
        drafts[each.fact].append(each)
    lines = []
    for fact, group in zip(facts, drafts, strict=True):
        keys, values = (torch.stack([getattr(each, name) for each in group]) for name in ("key", "value"))
        answer = encoded(tokenizer, fact.answer + fact.closing, start=False)
        told = told_of(tokenizer, fact, answer, reach_of(calibration, keys, rate, bool(fact.subject)))
        before, likely = (float(np.prod([getattr(each, name) for each in group])) for name in ("before", "likely"))
        lines.append(Line(told, keys, values, calibration.compared(keys[:1])[0], before, likely))
    return lines


def reach_of(calibration: Calibration, keys: Tensor, rate: float, named: bool) -> Tensor:
    """From which cosine on rows of one fact with the keys `(tokens, width)` answer, `(tokens,)`.

    Args:
        named: whether the fact has a subject.
    """
    reach = calibration.reach(keys, LED * rate, calibration.lowest / 2)
    reach[:1] = calibration.reach(keys[:1], rate)
    return reach if named else reach.clamp_min(ANYBODY)


def _check_named(tokenizer: Any, fact: Fact) -> None:
    """Raise `UserError` where a fact's own prompt does not name its subject in a way, or at a time, that it would notice."""
    if not fact.subject:
        return
    prompt = torch.tensor([encoded(tokenizer, fact.prompt)])
    ways = [encoded(tokenizer, way, start=False) for way in (fact.subject, " " + fact.subject)]
    _, ends, _ = Spotter(ways).ends(prompt)
    if not len(ends):
        raise UserError(
            f"the subject {fact.subject!r} is not a word of its own in the prompt {fact.prompt!r}; give it as it stands there"
        )
    if (ago := prompt.shape[1] - 1 - int(ends.max())) >= WINDOW:
        raise UserError(
            f"the subject {fact.subject!r} is named {ago} tokens before the answer; a fact knows of it for {WINDOW}, so name it "
            "nearer to the end"
        )


def told_of(tokenizer: Any, fact: Fact, answer: Sequence[int], reach: Tensor) -> Told:
    """A fact whose answer has these token ids, and whose rows reach so far, `(tokens,)`; without number and rows."""
    ways = {tuple(encoded(tokenizer, way, start=False)) for way in (fact.subject, " " + fact.subject) if fact.subject}
    return Told(
        0, fact.prompt, fact.answer, fact.subject, fact.tag, fact.source, time.time(), tuple(sorted(ways)), tuple(answer),
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


def rivals(history: Mapping[int, Told], number: int) -> list[Told]:
    """Of a history those that are there instead of fact `number`: what took its place, or the place of that, or says the same."""
    against, later = [], history[number].replaced_by
    while later is not None:
        against += [history[later]] if history[later].gone is None else []
        later = history[later].replaced_by
    asked = history[number].subject, plain(history[number].prompt)
    there = [each for each in history.values() if each.gone is None and (each.subject, plain(each.prompt)) == asked]
    return against + [each for each in there if each not in against]


def plain(text: str) -> str:
    """As it is compared with others."""
    return " ".join(text.lower().split())
