"""Rows written at inference: a student with associative memory stores what it reads."""

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
from dmt.models.forward import capture
from dmt.models.memories import get_associative_memories
from dmt.store.facts import NO_RUN, imported_namespaces, mark_imported
from dmt.store.records import IntArray, Namespace, RowInsert, StepChanges
from dmt.store.rows import RowStore

MAX_WRITE_PROB = 0.5  # positions whose next token is less probable are written
DISTILLED_TAG = "distilled"  # of rows that were saved with the weights


@dataclass(frozen=True)
class OnlineWriteResult:
    """Rows after a text was written.

    Attributes:
        added: new rows.
        merged: rows that were merged into others.
        evicted: rows that were removed to make room.
        rows: rows of the memory now.
    """

    added: int
    merged: int
    evicted: int
    rows: int


def write_online(
    model: PreTrainedModel, store: RowStore, ids: Tensor, tag: str
) -> OnlineWriteResult:
    """Write a text into the topmost associative memory and its store, in one transaction.

    A row is written where the next token was improbable. Its value makes that token probable, by
    one gradient (`edit.solve_value`). A memory whose values are projections of the hidden state
    writes a row for every token. Minimum distance, merging and capacity are those of the memory,
    so that it never outgrows its configuration.

    Args:
        model: a student with associative memory.
        store: the student's own, open for writing.
        ids: token IDs `(time,)`.
        tag: label of the rows.

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
        changes = StepChanges(committed.inserts, committed.removals, memory.rows.pop_usage())
        store.commit(NO_RUN, step, {namespace: changes})
    except BaseException:
        # Back to the rows in the store, as if the text had not been read.
        memory.rows.load_rows(store.scan(namespace), expected_rows=store.count(namespace))
        raise
    removed = {"merged": 0, "evicted": 0}
    for row_ids, reason in committed.removals:
        removed[reason] += len(row_ids)
    added = sum(len(insert.ids) for insert in committed.inserts)
    return OnlineWriteResult(
        added - removed["merged"], removed["merged"], removed["evicted"], len(memory.rows)
    )


def _queue_writes(
    model: PreTrainedModel, memory: AssociativeMemory, layer: int, tokens: Tensor, tag: str
) -> None:
    """Run the text through the model, and queue rows for it in `memory`."""
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
    """Return the namespaces of a student's associative memories in its own store, by layer.

    Rows that were saved with the weights are written to the store first, under their IDs.

    Raises:
        UserError: the student has no associative memory.
    """
    if not get_associative_memories(model) or store is None:
        raise UserError(
            "this student has no associative memory, so it cannot store rows; distill one with "
            "the config associative, or write facts with dmt memory write"
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
        # In one transaction: without the mark, the rows saved with the weights count.
        store.commit(
            NO_RUN,
            0,
            {namespace: StepChanges([insert])},
            extra_write=partial(mark_imported, namespace=namespace.name),
        )
    return namespaces


def describe_rows(model: PreTrainedModel) -> list[dict[str, Any]]:
    """List the rows of a student's associative memories.

    Returns:
        Dictionaries with `id`, `layer`, `tag` (several tags one a line), `entries`, `reads`,
        `created` and `last_read` (seconds since 1970).
    """
    descriptions = []
    for layer, memory in get_associative_memories(model).items():
        stats = memory.rows.stats
        for index in (memory.rows.ids >= 0).nonzero().flatten().tolist():
            descriptions.append(
                {
                    "id": int(memory.rows.ids[index]),
                    "layer": layer,
                    "tag": stats.tags[index],
                    "entries": int(stats.entries[index]),
                    "reads": int(stats.reads[index]),
                    "created": float(stats.created[index]),
                    "last_read": float(stats.last_read[index]),
                }
            )
    return descriptions


def drop_rows(
    model: PreTrainedModel,
    store: RowStore | None,
    ids: set[int] | None = None,
    tag: str | None = None,
    keep: Callable[[AssociativeMemory], int] | None = None,
) -> int:
    """Delete rows of a student's associative memories, and mark them as deleted in its store.

    Args:
        model: a student with associative memory.
        store: the student's own, open for writing.
        ids: row IDs; any where it is None.
        tag: the rows' only tag; any where it is None. A row that has other tags too stays.
        keep: how many rows of a memory stay, those with the highest scores; none where it is None.

    Returns:
        How many rows were deleted.

    Raises:
        UserError: the student has no associative memory, or a row does not exist; then none is
            deleted.
    """
    memories = get_associative_memories(model)
    if not memories or store is None:
        raise UserError(
            "this student has no associative memory, so it has no rows; leave --rows out for facts"
        )
    existing_ids = {row["id"] for row in describe_rows(model)}
    if ids and (missing := sorted(ids - existing_ids)):
        raise UserError(
            f"row {missing[0]} does not exist; dmt memory list --rows shows the "
            f"{len(existing_ids):,} that do"
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
            evicted = eviction_order(
                stats.score[indices],
                stats.score_step[indices],
                int(stats.score_step.max(initial=0)),
                memory.insert_policy.decay,
                max(0, len(indices) - keep(memory)),
            )
            indices = indices[evicted]
        removed[layer] = rows.ids_at(indices)
    reason = "forgotten" if keep is None else "evicted"
    changes = {
        namespaces[layer]: StepChanges(removals=[(row_ids, reason)])
        for layer, row_ids in removed.items()
    }
    store.commit(NO_RUN, 0, changes)
    for layer, row_ids in removed.items():
        memories[layer].rows.delete_rows(row_ids)
    return sum(map(len, removed.values()))
