"""Sleep: what rows say moves into the slots of a new student, and the rows leave; the student of the evening stays as it is.

What is gone through in a night: facts told in several ways, and prose. All of it is text, and the model's own answers to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.consolidation.replay import build_replay_set, pack_windows, sample_sentences
from dmt.consolidation.slot_training import RowQueries, TransferData, train_slots
from dmt.data.corpora import Corpus
from dmt.data.windows import get_prefix_ids
from dmt.editing.fact_store import FactStore, has_fact_store, load_student, open_fact_store
from dmt.editing.online import describe_rows
from dmt.errors import UserError
from dmt.evaluation.metrics import measure_fidelity
from dmt.evaluation.questions import Question, score_answers
from dmt.files import atomic_directory
from dmt.models.conversion import get_associative_memories, get_featural_memories
from dmt.models.fact_hooks import FACTS_FILE, copy_database, detach, disabled, get_fact_hooks
from dmt.models.fingerprint import hash_model
from dmt.models.forward import (
    forward_with_activations,
    forward_with_prefix,
)
from dmt.store import RowStore
from dmt.store.facts import CONSOLIDATED, FactTable, rebind_model
from dmt.store.records import FactRecord, StepChanges

DEFAULT_STEPS, DEFAULT_LR = 200, 0.03
"""Of a night, unless something else is asked for."""
MAX_WINDOW_TOKENS = 256
"""Tokens in a window of prose, or as many as the model reads."""
NUM_PROSE_WINDOWS = 384
"""Windows of training text that a night goes through."""
VALIDATION_TOKENS = 16_384
"""Tokens of each corpus's validation text by which it is measured what else has changed."""


@dataclass
class SlotTransferPlan:
    """A student before it sleeps, and what of its rows is to go into slots.

    Attributes:
        facts: whose rows are to go.
        known: facts that went in earlier nights, and that it still says.
        rows: numbers of the rows of associative memories that are to go, by layer.
        memories: layers whose slots may change: none below that which hears facts, or one whose rows stay awake, so that
            what stays, and what may be restored, is found exactly as before.
    """

    folder: Path
    fact_store: FactStore
    facts: list[FactRecord]
    retained_facts: list[FactRecord]
    rows: dict[int, list[int]]
    layers: list[int]


@dataclass
class SlotTransferResult:
    """What became of it."""

    facts: int
    rows: int
    remaining_rows: int
    recall_before: float
    recall_after: float
    retained: int
    retained_before: float
    retained_after: float
    row_explained_share: dict[int, float]
    kl: dict[str, float]
    seconds: float
    student: str


def plan_slot_transfer(folder: Path, tag: str | None = None, min_hits: int = 0) -> SlotTransferPlan:
    """What is to sleep of a student.

    Args:
        tag: under which it is filed; any where it is None.
        least: how often a row has to have answered.

    Raises:
        UserError: the student has no slots that may change, or there is nothing like that.
    """
    fact_store = (
        open_fact_store(folder, read_only=True)
        if has_fact_store(folder)
        else FactStore(*load_student(folder), None)
    )
    model = fact_store.model
    layers = _find_trainable_layers(model)
    fact_table = FactTable(fact_store.db) if fact_store.db is not None else None
    has_facts = fact_table is not None and fact_table.exists
    hit_counts = (
        fact_table.read_usage() if fact_table is not None and has_facts and min_hits else {}
    )
    facts = [
        fact
        for fact in fact_store.records.values()
        if (tag is None or fact.tag == tag)
        and (not min_hits or max(hit_counts[row][0] for row in fact.rows) >= min_hits)
    ]
    rows, layers = _select_rows(model, layers, tag, min_hits)
    if not facts and not rows:
        qualifier = "" if tag is None and not min_hits else " like that"
        raise UserError(
            f"{folder} has no rows{qualifier} to sleep on; write facts with dmt memory write, or see dmt memory list for what there is"
        )
    history = (
        []
        if fact_table is None or not has_facts
        else [
            fact
            for fact in fact_table.read(include_deleted=True)
            if fact.deleted_reason == CONSOLIDATED
        ]
    )
    retained = _latest_facts(history, list(fact_store.records.values()))
    retained = [
        fact
        for fact, is_correct in zip(
            retained, check_facts(model, fact_store.tokenizer, retained), strict=True
        )
        if is_correct
    ]
    return SlotTransferPlan(folder, fact_store, facts, retained, rows, layers)


def _select_rows(
    model: PreTrainedModel, layers: Sequence[int], tag: str | None, min_hits: int
) -> tuple[dict[int, list[int]], list[int]]:
    """Numbers of rows of associative memories that are to go, by layer, and which of `memories` may change for the others."""
    selected: dict[int, list[int]] = {}
    min_layer = 0
    for row in describe_rows(model):
        if (
            row["layer"] in layers
            and (tag is None or row["tag"] == tag)
            and row["reads"] >= min_hits
        ):
            selected.setdefault(row["layer"], []).append(row["row"])
        else:
            min_layer = max(min_layer, row["layer"])
    return {layer: row_ids for layer, row_ids in selected.items() if layer >= min_layer}, [
        layer for layer in layers if layer >= min_layer
    ]


def _find_trainable_layers(model: PreTrainedModel) -> list[int]:
    """Layers whose slots may change.

    Raises:
        UserError: there are none.
    """
    memories = get_featural_memories(model)
    if not memories:
        raise UserError(
            "this student has no featural memory, so it has no slots to learn; distill one with dmt distill"
        )
    if getattr(model.config, "external_tensors", None) or any(
        memory.has_external_tensors for memory in memories.values()
    ):
        raise UserError(
            "the slots of this student are in a file or in few bits and do not change; sleep on a student distilled with "
            "memory.offload=none memory.value_dtype=float32"
        )
    overlay = get_fact_hooks(model)
    min_layer = 0 if overlay is None else overlay.key_layer
    if not (layers := [layer for layer in memories if layer >= min_layer]):
        raise UserError(
            f"facts are heard in layer {min_layer}, and the slots of this student are all below it, so they cannot learn them; "
            "distil a student with featural memory in its upper layers"
        )
    return layers


def _latest_facts(
    history: Sequence[FactRecord], active_facts: Sequence[FactRecord]
) -> list[FactRecord]:
    """Of facts in the same words the one told last, unless a row that is awake says something else by now."""
    active_keys = {(fact.subject, fact.prompt) for fact in active_facts}
    latest = {(fact.subject, fact.prompt): fact for fact in history}
    return [fact for key, fact in latest.items() if key not in active_keys]


def check_facts(model: PreTrainedModel, tokenizer: Any, facts: Sequence[FactRecord]) -> list[bool]:
    """Whether each fact is what the model would say."""
    questions = [Question(fact.prompt, fact.answer) for fact in facts]
    return score_answers(
        partial(forward_with_prefix, model, get_prefix_ids(tokenizer)),
        tokenizer,
        questions,
        next(model.parameters()).device,
    ).correct


def transfer_rows(
    plan: SlotTransferPlan,
    corpora: Sequence[Corpus],
    output: Path,
    steps: int = DEFAULT_STEPS,
    lr: float = DEFAULT_LR,
    seed: int = 0,
    on_message: Callable[[str], None] = lambda _: None,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, found: None,
) -> SlotTransferResult:
    """Learn, write the new student to `output`, load it and measure it.

    Args:
        corpora: text that the student was trained on, whose validation part is held out.
        output: a folder that is made whole, or not at all.
        told: is given lines about what is going on.
        heard: as in `night.learn`.
    """
    start_time = time.perf_counter()
    fact_store, tokenizer = plan.fact_store, plan.fact_store.tokenizer
    teacher = fact_store.model
    if get_fact_hooks(teacher) is not None:
        fact_store.hooks.set_rows(
            [fact_row for fact in plan.facts for fact_row in fact_store.get_rows(fact.id)]
        )  # others are to stay rows
    student = load_student(plan.folder)[0]
    detach(student)
    memories = get_featural_memories(student)
    on_message("collecting what is to be learnt, and what is to stay ...")
    drop_rows(student, plan.rows)
    data = _build_transfer_data(plan, teacher, student, corpora, seed)
    on_message(
        f"{len(data.new_examples):,} tellings of {len(plan.facts):,} facts, {len(data.retained_examples):,} of what was learnt before"
    )
    train_slots(
        teacher,
        student,
        {layer: memories[layer] for layer in plan.layers},
        data,
        steps,
        lr,
        seed,
        on_step,
    )
    explained_shares = {
        layer: queries.explained_share() for layer, queries in data.row_queries.items()
    }
    with atomic_directory(output) as folder:
        student.eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _copy_fact_store(plan, student, folder)
    metrics = _evaluate_transfer(plan, output, corpora)
    num_rows = sum(len(fact.rows) for fact in plan.facts) + sum(map(len, plan.rows.values()))
    return SlotTransferResult(
        len(plan.facts),
        num_rows,
        row_explained_share=explained_shares,
        seconds=time.perf_counter() - start_time,
        student=str(output),
        **metrics,
    )


def drop_rows(student: PreTrainedModel, rows: dict[int, list[int]]) -> None:
    """Take rows out of a model's associative memories, by layer."""
    for layer, row_ids in rows.items():
        get_associative_memories(student)[layer].rows.delete_rows(row_ids)


def _build_transfer_data(
    plan: SlotTransferPlan,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    corpora: Sequence[Corpus],
    seed: int,
) -> TransferData:
    tokenizer = plan.fact_store.tokenizer
    sentences = sample_sentences(corpora, seed)
    new_examples = build_replay_set(teacher, tokenizer, plan.facts, sentences, seed)
    retained_examples = build_replay_set(
        teacher, tokenizer, plan.retained_facts, sentences, seed + 1
    )
    seq_len = min(MAX_WINDOW_TOKENS, teacher.config.max_position_embeddings)
    windows_by_corpus = [
        pack_windows(corpus.train, tokenizer, seq_len, NUM_PROSE_WINDOWS // len(corpora), seed)
        for corpus in corpora
    ]
    prose = torch.cat(windows_by_corpus)[
        torch.randperm(
            sum(map(len, windows_by_corpus)), generator=torch.Generator().manual_seed(seed)
        )
    ]
    row_queries = _build_row_queries(plan, teacher, student, prose)
    return TransferData(new_examples, retained_examples, prose, row_queries)


def _build_row_queries(
    plan: SlotTransferPlan, teacher: PreTrainedModel, student: PreTrainedModel, prose: Tensor
) -> dict[int, RowQueries]:
    if not plan.rows:
        return {}
    with torch.no_grad():
        inputs = forward_with_activations(
            student, prose[:8].to(next(student.parameters()).device), capture_blocks=True
        ).block_inputs
    teacher_memories, student_memories = (
        get_associative_memories(teacher),
        get_associative_memories(student),
    )
    return {
        layer: RowQueries(
            teacher_memories[layer], student_memories[layer], row_ids, inputs[layer].flatten(0, 1)
        )
        for layer, row_ids in plan.rows.items()
    }


def _copy_fact_store(plan: SlotTransferPlan, student: PreTrainedModel, folder: Path) -> None:
    """Give the new student what was in the evening's book, without the rows that slept; the history says where they are."""
    if plan.fact_store.db is None:
        return
    copy_database(plan.folder / FACTS_FILE, folder / FACTS_FILE)
    with closing(RowStore(str(folder / FACTS_FILE))) as store:
        fact_table = FactTable(store)
        fact_table.soft_delete([fact.id for fact in plan.facts], CONSOLIDATED)
        namespaces = {namespace.name: namespace for namespace in store.list_namespaces()}
        removed = {
            namespaces[f"layer_{layer}"]: row_ids
            for layer, row_ids in plan.rows.items()
            if f"layer_{layer}" in namespaces
        }
        store.commit(
            "dmt",
            0,
            {
                namespace: StepChanges(removals=[(_to_numpy(row_ids), CONSOLIDATED)])
                for namespace, row_ids in removed.items()
            },
        )
        rebind_model(store, hash_model(student))


def _to_numpy(row_ids: Sequence[int]) -> Any:
    return torch.tensor(row_ids).numpy()


@torch.no_grad()
def _evaluate_transfer(
    plan: SlotTransferPlan, output: Path, corpora: Sequence[Corpus]
) -> dict[str, Any]:
    """What the student says that was saved, loaded anew, beside the student of the evening."""
    teacher, tokenizer = load_student(plan.folder)
    student = load_student(output)[0]
    seq_len = min(MAX_WINDOW_TOKENS, teacher.config.max_position_embeddings)
    kl = {}
    with disabled(student):
        recalls = [
            _compute_recall(model, tokenizer, facts)
            for facts in (plan.facts, plan.retained_facts)
            for model in (teacher, student)
        ]
    for corpus in corpora:
        kl[corpus.name] = measure_fidelity(
            student,
            teacher,
            pack_windows(corpus.validation, tokenizer, seq_len, VALIDATION_TOKENS // seq_len),
        ).kl
    overlay = get_fact_hooks(student)
    num_remaining = (0 if overlay is None else len(overlay)) + len(describe_rows(student))
    recall_names = ("recall_before", "recall_after", "retained_before", "retained_after")
    return dict(zip(recall_names, recalls, strict=True)) | {
        "kl": kl,
        "remaining_rows": num_remaining,
        "retained": len(plan.retained_facts),
    }


def _compute_recall(model: PreTrainedModel, tokenizer: Any, facts: Sequence[FactRecord]) -> float:
    return sum(check_facts(model, tokenizer, facts)) / len(facts) if facts else 1.0
