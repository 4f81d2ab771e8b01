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

from dmt.editing.edit import solve_value
from dmt.errors import UserError
from dmt.memory import AssociativeMemory
from dmt.memory.row_table import eviction_order
from dmt.models.conversion import get_associative_memories
from dmt.models.forward import capture
from dmt.store import RowStore
from dmt.store.facts import NO_RUN, imported_namespaces, mark_imported
from dmt.store.records import IntArray, Namespace, RowInsert, StepChanges

MAX_WRITE_PROB = 0.5
"""Probability of the next token below which a place is worth a row."""
DISTILLED_TAG = "distilled"
"""Tag of rows that came with the weights."""


@dataclass(frozen=True)
class OnlineWriteResult:
    """What became of a text: rows added, merged into others, evicted for them, and rows there are now."""

    added: int
    merged: int
    evicted: int
    rows: int


def write_online(
    model: PreTrainedModel, store: RowStore, ids: Tensor, tag: str
) -> OnlineWriteResult:
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
    namespaces, memories = ensure_namespaces(model, store), get_associative_memories(model)
    layer = max(memories)
    memory = memories[layer]
    namespace = namespaces[layer]
    if len(ids) < 2:
        return OnlineWriteResult(0, 0, 0, len(memory.rows))
    device = next(model.parameters()).device
    tokens = ids.to(device).unsqueeze(0)
    _queue_writes(model, memory, layer, tokens, tag)
    step = int(memory.rows.stats.score_step.max(initial=0)) + 1
    try:
        committed = memory.commit_step(step, time.time(), store.reserve_ids)
        store.commit(
            NO_RUN,
            step,
            {
                namespace: StepChanges(
                    committed.inserts, committed.removals, memory.rows.pop_usage()
                )
            },
        )
    except BaseException:
        memory.rows.load_rows(
            store.scan(namespace), expected_rows=store.count(namespace)
        )  # as if nothing had been read
        raise
    removed = {
        kind: sum(len(row_ids) for row_ids, reason in committed.removals if reason == kind)
        for kind in ("merged", "evicted")
    }
    added = sum(len(insert.ids) for insert in committed.inserts)
    return OnlineWriteResult(
        added - removed["merged"], removed["merged"], removed["evicted"], len(memory.rows)
    )


def _queue_writes(
    model: PreTrainedModel, memory: AssociativeMemory, layer: int, tokens: Tensor, tag: str
) -> None:
    """Let `memory` read the text and offer rows for it."""
    positions = torch.arange(tokens.shape[1] - 1, device=tokens.device)
    targets: Tensor | None = None
    write_mask = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
    if memory.value is None:
        solution = solve_value(
            model, tokens, torch.zeros_like(positions), positions, tokens[0, 1:], layer, layer
        )
        write_mask[0, :-1] = solution.prob_before < MAX_WRITE_PROB
        targets = torch.zeros(*tokens.shape, memory.width, device=tokens.device)
        targets[0, :-1] = solution.values
    with torch.no_grad(), memory.writes_enabled(tag), capture({layer: memory}) as activations:
        model(tokens, use_cache=False)
        if targets is not None:
            memory.set_targets(activations.outputs[layer].float() + targets, write_mask)


def ensure_namespaces(model: PreTrainedModel, store: RowStore | None) -> dict[int, Namespace]:
    """The namespaces of a student's associative memories in its own store, with their rows, by layer.

    Rows that came with the weights are put there first, under their numbers: `opening.open_book` keeps those free.

    Raises:
        UserError: the student has no associative memory.
    """
    if not get_associative_memories(model) or store is None:
        raise UserError(
            "this student has no associative memory, so it cannot remember; distil one with configs/associative.yaml, or write "
            "facts with dmt memory write"
        )
    namespaces: dict[int, Namespace] = {}
    imported = imported_namespaces(store)
    for layer, memory in get_associative_memories(model).items():
        namespace = namespaces[layer] = store.get_or_create_namespace(
            f"layer_{layer}", memory.width, memory.width
        )
        if namespace.name in imported:
            continue
        rows, stats = memory.rows, memory.rows.stats
        stats.tags[:] = [tag or DISTILLED_TAG for tag in stats.tags]
        slots = (rows.ids >= 0).nonzero().flatten()
        slot_indices = slots.cpu().numpy()
        insert = RowInsert(
            rows.ids_at(slots),
            rows.keys[slots].float().cpu().numpy(),
            rows.values[slots].float().cpu().numpy(),
            stats.score[slot_indices].astype(np.float32),
            [stats.tags[index] for index in slot_indices],
            stats.entries[slot_indices],
            [float(created) or time.time() for created in stats.created[slot_indices]],
            stats.pinned[slot_indices],
        )
        # All of them and the word that they are there, or neither: without the word those of the weights count.
        store.commit(
            NO_RUN,
            0,
            {namespace: StepChanges([insert])},
            extra_write=partial(mark_imported, namespace=namespace.name),
        )
    return namespaces


def describe_rows(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Every row of a student's associative memories: layer, number, tag, entries, reads, when it was made and last read."""
    descriptions = []
    for layer, memory in get_associative_memories(model).items():
        stats = memory.rows.stats
        for index in (memory.rows.ids >= 0).nonzero().flatten().tolist():
            identity = {
                "layer": layer,
                "row": int(memory.rows.ids[index]),
                "tag": stats.tags[index],
            }
            counts = {"entries": int(stats.entries[index]), "reads": int(stats.reads[index])}
            times = {
                "created": float(stats.created[index]),
                "last_read": float(stats.last_read[index]),
            }
            descriptions.append(identity | counts | times)
    return descriptions


def drop_rows(
    model: PreTrainedModel,
    store: RowStore | None,
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
    memories = get_associative_memories(model)
    if not memories or store is None:
        raise UserError(
            "this student has no associative memory, so it has no rows; leave --rows out to mean facts"
        )
    existing_ids = {row["row"] for row in describe_rows(model)}
    if ids and (missing := sorted(ids - existing_ids)):
        raise UserError(
            f"row {missing[0]} is not there; dmt memory list --rows shows the {len(existing_ids):,} that are"
        )
    namespaces = ensure_namespaces(model, store)
    removed: dict[int, IntArray] = {}
    for layer, memory in memories.items():
        rows, stats = memory.rows, memory.rows.stats
        indices = (rows.ids >= 0).nonzero().flatten().cpu().numpy()
        row_ids = rows.ids_at(indices)
        id_mask = np.isin(row_ids, list(ids)) if ids is not None else np.ones(len(indices), bool)
        tag_mask = [tag is None or tag == stats.tags[index] for index in indices]
        indices = indices[id_mask & np.array(tag_mask, bool)]
        if keep is not None:
            step = int(stats.score_step.max(initial=0))
            count = max(0, len(indices) - keep(memory))
            indices = indices[
                eviction_order(
                    stats.score[indices],
                    stats.score_step[indices],
                    step,
                    memory.insert_policy.decay,
                    count,
                )
            ]
        removed[layer] = rows.ids_at(indices)
    reason = "forgotten" if keep is None else "evicted"
    store.commit(
        NO_RUN,
        0,
        {
            namespaces[layer]: StepChanges(removals=[(row_ids, reason)])
            for layer, row_ids in removed.items()
        },
    )
    for layer, row_ids in removed.items():
        memories[layer].rows.delete_rows(row_ids)
    return sum(map(len, removed.values()))
