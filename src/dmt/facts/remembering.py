"""A student with associative memory that remembers what it has read: rows written at inference, without a teacher."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.errors import UserError
from dmt.facts.drafting import steer
from dmt.memory import AssociativeMemory
from dmt.memory.heat import coldest
from dmt.models.surgery import associative_of
from dmt.records import Changes, Insert, Namespace, Numbers
from dmt.store import Store
from dmt.store.ledger import BY, settle, settled

SURPRISE = 0.5
"""Probability of the next token below which a place is worth a row."""
DISTILLED = "distilled"
"""Tag of rows that came with the weights."""


@dataclass(frozen=True)
class Remembered:
    """What became of a text: rows added, merged into others, evicted for them, and rows there are now."""

    added: int
    merged: int
    evicted: int
    rows: int


def remember(model: PreTrainedModel, store: Store, ids: Tensor, tag: str) -> Remembered:
    """Write what token ids `(time,)` say into the topmost associative memory, and into its store, in one transaction.

    Where the next token came as a surprise the row says what would have made the model expect it, by one gradient
    (`drafting.steer`); a memory whose values are projections of the state writes them for every token. Novelty,
    recombination and capacity are the memory's own, so that it never grows beyond what it was made for.

    Args:
        store: the student's own, open for writing; where it does not have the memory's rows yet they are put there.
        tag: where the text comes from.

    Raises:
        UserError: the student has no associative memory; nothing is written.
    """
    spaces, memories = settle_in(model, store), associative_of(model)
    layer = max(memories)
    memory = memories[layer]
    space = spaces[layer]
    if len(ids) < 2:
        return Remembered(0, 0, 0, len(memory.rows))
    device = next(model.parameters()).device
    tokens = ids.to(device).unsqueeze(0)
    _offer(model, memory, layer, tokens, tag)
    step = int(memory.rows.histories.heat_step.max(initial=0)) + 1
    try:
        made = memory.settle(step, time.time(), store.take_ids)
        store.commit(BY, step, {space: Changes(made.inserts, made.removals, memory.rows.take_usage())})
    except BaseException:
        memory.rows.rebuild(store.scan(space), expected=store.count(space))  # as if nothing had been read
        raise
    gone = {why: sum(len(numbers) for numbers, reason in made.removals if reason == why) for why in ("merged", "evicted")}
    added = sum(len(part.ids) for part in made.inserts)
    return Remembered(added - gone["merged"], gone["merged"], gone["evicted"], len(memory.rows))


def _offer(model: PreTrainedModel, memory: AssociativeMemory, layer: int, tokens: Tensor, tag: str) -> None:
    """Let `memory` read the text and offer rows for it."""
    columns = torch.arange(tokens.shape[1] - 1, device=tokens.device)
    taught: Tensor | None = None
    worth = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
    if memory.value is None:
        steps = steer(model, tokens, torch.zeros_like(columns), columns, tokens[0, 1:], layer, layer)
        worth[0, :-1] = steps.before < SURPRISE
        taught = torch.zeros(*tokens.shape, memory.width, device=tokens.device)
        taught[0, :-1] = steps.values
    said: list[Tensor] = []
    hook = memory.register_forward_hook(lambda _, __, answer: said.append(answer.detach()))
    memory.writing, memory.tag = True, tag
    try:
        with torch.no_grad():
            model(tokens, use_cache=False)
            if taught is not None:
                memory.teach(said[-1].float() + taught, worth)
    except BaseException:
        memory.discard()
        raise
    finally:
        memory.writing, memory.tag = False, ""
        hook.remove()


def settle_in(model: PreTrainedModel, store: Store | None) -> dict[int, Namespace]:
    """The namespaces of a student's associative memories in its own store, with their rows, by layer.

    Rows that came with the weights are put there first, under their numbers: `opening.open_book` keeps those free.

    Raises:
        UserError: the student has no associative memory.
    """
    if not associative_of(model) or store is None:
        raise UserError(
            "this student has no associative memory, so it cannot remember; distil one with configs/associative.yaml, or write "
            "facts with dmt memory write"
        )
    spaces: dict[int, Namespace] = {}
    there = settled(store)
    for layer, memory in associative_of(model).items():
        space = spaces[layer] = store.namespace(f"layer_{layer}", memory.width, memory.width)
        if space.name in there:
            continue
        rows, known = memory.rows, memory.rows.histories
        known.tags[:] = [tag or DISTILLED for tag in known.tags]
        at = (rows.ids >= 0).nonzero().flatten()
        places = at.cpu().numpy()
        part = Insert(
            rows.numbers(at), rows.keys[at].float().cpu().numpy(), rows.values[at].float().cpu().numpy(),
            known.heat[places].astype(np.float32), [known.tags[place] for place in places], known.entries[places],
            [float(when) or time.time() for when in known.created[places]], known.pinned[places],
        )  # fmt: skip
        # All of them and the word that they are there, or neither: without the word those of the weights count.
        store.commit(BY, 0, {space: Changes([part])}, also=partial(settle, namespace=space.name))
    return spaces


def rows_about(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Every row of a student's associative memories: layer, number, tag, entries, reads, when it was made and last read."""
    found = []
    for layer, memory in associative_of(model).items():
        known = memory.rows.histories
        for place in (memory.rows.ids >= 0).nonzero().flatten().tolist():
            about = {"layer": layer, "row": int(memory.rows.ids[place]), "tag": known.tags[place]}
            counts = {"entries": int(known.entries[place]), "reads": int(known.reads[place])}
            times = {"created": float(known.created[place]), "last_read": float(known.last_read[place])}
            found.append(about | counts | times)
    return found


def drop_rows(
    model: PreTrainedModel,
    store: Store | None,
    ids: set[int] | None = None,
    tag: str | None = None,
    keep: Callable[[AssociativeMemory], int] | None = None,
) -> int:
    """Take rows out of a student's associative memories and mark them in its store; how many.

    Args:
        ids: numbers of rows that leave; all where it is None.
        tag: whose tag this is, for them to leave; any where it is None. A row that something else is in too, stays.
        keep: how many of a memory's rows stay, the warmest.

    Raises:
        UserError: the student has no associative memory, or a number is not there; then none leaves.
    """
    memories = associative_of(model)
    if not memories or store is None:
        raise UserError("this student has no associative memory, so it has no rows; leave --rows out to mean facts")
    known = {row["row"] for row in rows_about(model)}
    if ids and (missing := sorted(ids - known)):
        raise UserError(f"row {missing[0]} is not there; dmt memory list --rows shows the {len(known):,} that are")
    spaces = settle_in(model, store)
    leaving: dict[int, Numbers] = {}
    for layer, memory in memories.items():
        rows, histories = memory.rows, memory.rows.histories
        at = (rows.ids >= 0).nonzero().flatten().cpu().numpy()
        numbers = rows.numbers(at)
        named = np.isin(numbers, list(ids)) if ids is not None else np.ones(len(at), bool)
        tagged = [tag is None or tag == histories.tags[place] for place in at]
        at = at[named & np.array(tagged, bool)]
        if keep is not None:
            now = int(histories.heat_step.max(initial=0))
            count = max(0, len(at) - keep(memory))
            at = at[coldest(histories.heat[at], histories.heat_step[at], now, memory.policy.decay, count)]
        leaving[layer] = rows.numbers(at)
    why = "forgotten" if keep is None else "evicted"
    store.commit(BY, 0, {spaces[layer]: Changes(removals=[(numbers, why)]) for layer, numbers in leaving.items()})
    for layer, numbers in leaving.items():
        memories[layer].rows.drop(numbers)
    return sum(map(len, leaving.values()))
