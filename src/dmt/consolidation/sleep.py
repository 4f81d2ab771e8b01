"""Sleep: what rows say moves into the slots of a new student, and the rows leave; the student of the evening stays as it is."""

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

from dmt.consolidation.asking import Question, answers
from dmt.consolidation.dreaming import sentences_of, tellings, windows
from dmt.consolidation.hearing import after
from dmt.consolidation.night import Matter, learn
from dmt.consolidation.rowing import RowStates
from dmt.data.corpora import Corpus
from dmt.data.encoding import start_of
from dmt.disk import whole_folder
from dmt.distill.signals import observe
from dmt.errors import UserError
from dmt.evaluate import compare
from dmt.facts.book import Book
from dmt.facts.opening import has_book, load_student, open_book
from dmt.facts.remembering import rows_about
from dmt.models.books import BOOK, copy_book
from dmt.models.fingerprint import fingerprint
from dmt.models.overlay import lift, overlay_of, silence
from dmt.models.surgery import associative_of, featural_of
from dmt.records import Changes, Told
from dmt.store import Store
from dmt.store.ledger import SLEPT, Ledger, pass_on

STEPS, RATE = 200, 0.03
"""Of a night, unless something else is asked for."""
BLOCK = 256
"""Tokens in a window of prose, or as many as the model reads."""
POOL = 384
"""Windows of training text that a night goes through."""
HELD_OUT = 16_384
"""Tokens of each corpus's validation text by which it is measured what else has changed."""


@dataclass
class Evening:
    """A student before it sleeps, and what of its rows is to go into slots.

    Attributes:
        facts: whose rows are to go.
        known: facts that went in earlier nights, and that it still says.
        rows: numbers of the rows of associative memories that are to go, by layer.
        memories: layers whose slots may change: none below that which hears facts, or one whose rows stay awake, so that
            what stays, and what may be restored, is found exactly as before.
    """

    folder: Path
    book: Book
    facts: list[Told]
    known: list[Told]
    rows: dict[int, list[int]]
    memories: list[int]


@dataclass
class Night:
    """What became of it."""

    facts: int
    rows: int
    awake: int
    recall_before: float
    recall_after: float
    known: int
    known_before: float
    known_after: float
    rows_kept: dict[int, float]
    kl: dict[str, float]
    seconds: float
    student: str


def evening(folder: Path, tag: str | None = None, least: int = 0) -> Evening:
    """What is to sleep of a student.

    Args:
        tag: under which it is filed; any where it is None.
        least: how often a row has to have answered.

    Raises:
        UserError: the student has no slots that may change, or there is nothing like that.
    """
    book = open_book(folder, read_only=True) if has_book(folder) else Book(*load_student(folder), None)
    model = book.model
    memories = _may_change(model)
    ledger = Ledger(book.store) if book.store is not None else None
    written = ledger is not None and ledger.exists
    uses = ledger.uses() if ledger is not None and written and least else {}
    facts = [
        fact for fact in book.known.values()
        if (tag is None or fact.tag == tag) and (not least or max(uses[row][0] for row in fact.rows) >= least)
    ]  # fmt: skip
    rows, memories = _rows(model, memories, tag, least)
    if not facts and not rows:
        like = "" if tag is None and not least else " like that"
        raise UserError(
            f"{folder} has no rows{like} to sleep on; write facts with dmt memory write, or see dmt memory list for what there is"
        )
    history = [] if ledger is None or not written else [fact for fact in ledger.read(gone=True) if fact.gone == SLEPT]
    known = _last(history, list(book.known.values()))
    known = [fact for fact, right in zip(known, said(model, book.tokenizer, known), strict=True) if right]
    return Evening(folder, book, facts, known, rows, memories)


def _rows(model: PreTrainedModel, memories: Sequence[int], tag: str | None, least: int) -> tuple[dict[int, list[int]], list[int]]:
    """Numbers of rows of associative memories that are to go, by layer, and which of `memories` may change for the others."""
    chosen: dict[int, list[int]] = {}
    lowest = 0
    for row in rows_about(model):
        if row["layer"] in memories and (tag is None or row["tag"] == tag) and row["reads"] >= least:
            chosen.setdefault(row["layer"], []).append(row["row"])
        else:
            lowest = max(lowest, row["layer"])
    return {layer: ids for layer, ids in chosen.items() if layer >= lowest}, [layer for layer in memories if layer >= lowest]


def _may_change(model: PreTrainedModel) -> list[int]:
    """Layers whose slots may change.

    Raises:
        UserError: there are none.
    """
    found = featural_of(model)
    if not found:
        raise UserError("this student has no featural memory, so it has no slots to learn; distil one with python distill.py")
    if getattr(model.config, "slots", None) or any(memory.is_filed for memory in found.values()):
        raise UserError(
            "the slots of this student are in a file or in few bits and do not change; sleep on a student distilled with "
            "memory.disk=none memory.value_type=float32"
        )
    overlay = overlay_of(model)
    lowest = 0 if overlay is None else overlay.listens
    if not (chosen := [layer for layer in found if layer >= lowest]):
        raise UserError(
            f"facts are heard in layer {lowest}, and the slots of this student are all below it, so they cannot learn them; "
            "distil a student with featural memory in its upper layers"
        )
    return chosen


def _last(history: Sequence[Told], awake: Sequence[Told]) -> list[Told]:
    """Of facts in the same words the one told last, unless a row that is awake says something else by now."""
    asked = {(fact.subject, fact.prompt) for fact in awake}
    last = {(fact.subject, fact.prompt): fact for fact in history}
    return [fact for what, fact in last.items() if what not in asked]


def said(model: PreTrainedModel, tokenizer: Any, facts: Sequence[Told]) -> list[bool]:
    """Whether each fact is what the model would say."""
    questions = [Question(fact.prompt, fact.answer) for fact in facts]
    return answers(partial(after, model, start_of(tokenizer)), tokenizer, questions, next(model.parameters()).device).right


def sleep(
    before: Evening,
    corpora: Sequence[Corpus],
    output: Path,
    steps: int = STEPS,
    lr: float = RATE,
    seed: int = 0,
    told: Callable[[str], None] = lambda _: None,
    heard: Callable[[int, dict[str, float]], None] = lambda step, found: None,
) -> Night:
    """Learn, write the new student to `output`, load it and measure it.

    Args:
        corpora: text that the student was trained on, whose validation part is held out.
        output: a folder that is made whole, or not at all.
        told: is given lines about what is going on.
        heard: as in `night.learn`.
    """
    began = time.perf_counter()
    book, tokenizer = before.book, before.book.tokenizer
    teacher = book.model
    if overlay_of(teacher) is not None:
        book.overlay.hold([part for fact in before.facts for part in book.parts(fact.id)])  # others are to stay rows
    student = load_student(before.folder)[0]
    lift(student)
    slots = featural_of(student)
    told("collecting what is to be learnt, and what is to stay ...")
    drop(student, before.rows)
    matter = _matter(before, teacher, student, corpora, seed)
    told(f"{len(matter.new):,} tellings of {len(before.facts):,} facts, {len(matter.known):,} of what was learnt before")
    learn(teacher, student, {layer: slots[layer] for layer in before.memories}, matter, steps, lr, seed, heard)
    kept = {layer: states.kept() for layer, states in matter.rows.items()}
    with whole_folder(output) as folder:
        student.eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _pass_book_on(before, student, folder)
    found = _measure(before, output, corpora)
    rows = sum(len(fact.rows) for fact in before.facts) + sum(map(len, before.rows.values()))
    return Night(len(before.facts), rows, rows_kept=kept, seconds=time.perf_counter() - began, student=str(output), **found)


def drop(student: PreTrainedModel, rows: dict[int, list[int]]) -> None:
    """Take rows out of a model's associative memories, by layer."""
    for layer, numbers in rows.items():
        associative_of(student)[layer].rows.drop(numbers)


def _matter(before: Evening, teacher: PreTrainedModel, student: PreTrainedModel, corpora: Sequence[Corpus], seed: int) -> Matter:
    tokenizer = before.book.tokenizer
    sentences = sentences_of(corpora, seed)
    new = tellings(teacher, tokenizer, before.facts, sentences, seed)
    known = tellings(teacher, tokenizer, before.known, sentences, seed + 1)
    block = min(BLOCK, teacher.config.max_position_embeddings)
    texts = [windows(corpus.train, tokenizer, block, POOL // len(corpora), seed) for corpus in corpora]
    prose = torch.cat(texts)[torch.randperm(sum(map(len, texts)), generator=torch.Generator().manual_seed(seed))]
    states = _row_states(before, teacher, student, prose)
    return Matter(new, known, prose, states)


def _row_states(before: Evening, teacher: PreTrainedModel, student: PreTrainedModel, prose: Tensor) -> dict[int, RowStates]:
    if not before.rows:
        return {}
    with torch.no_grad():
        inputs = observe(student, prose[:8].to(next(student.parameters()).device), blocks=True).block_inputs
    one, other = associative_of(teacher), associative_of(student)
    return {
        layer: RowStates(one[layer], other[layer], numbers, inputs[layer].flatten(0, 1)) for layer, numbers in before.rows.items()
    }


def _pass_book_on(before: Evening, student: PreTrainedModel, folder: Path) -> None:
    """Give the new student what was in the evening's book, without the rows that slept; the history says where they are."""
    if before.book.store is None:
        return
    copy_book(before.folder / BOOK, folder / BOOK)
    with closing(Store(str(folder / BOOK))) as store:
        ledger = Ledger(store)
        ledger.leave([fact.id for fact in before.facts], SLEPT)
        there = {space.name: space for space in store.namespaces()}
        gone = {there[f"layer_{layer}"]: ids for layer, ids in before.rows.items() if f"layer_{layer}" in there}
        store.commit("dmt", 0, {space: Changes(removals=[(_numbers(ids), SLEPT)]) for space, ids in gone.items()})
        pass_on(store, fingerprint(student))


def _numbers(ids: Sequence[int]) -> Any:
    return torch.tensor(ids).numpy()


@torch.no_grad()
def _measure(before: Evening, output: Path, corpora: Sequence[Corpus]) -> dict[str, Any]:
    """What the student says that was saved, loaded anew, beside the student of the evening."""
    teacher, tokenizer = load_student(before.folder)
    student = load_student(output)[0]
    block = min(BLOCK, teacher.config.max_position_embeddings)
    apart = {}
    with silence(student):
        alone = [_recall(model, tokenizer, each) for each in (before.facts, before.known) for model in (teacher, student)]
    for corpus in corpora:
        apart[corpus.name] = compare(student, teacher, windows(corpus.validation, tokenizer, block, HELD_OUT // block)).kl
    overlay = overlay_of(student)
    awake = (0 if overlay is None else len(overlay)) + len(rows_about(student))
    names = ("recall_before", "recall_after", "known_before", "known_after")
    return dict(zip(names, alone, strict=True)) | {"kl": apart, "awake": awake, "known": len(before.known)}


def _recall(model: PreTrainedModel, tokenizer: Any, facts: Sequence[Told]) -> float:
    return sum(said(model, tokenizer, facts)) / len(facts) if facts else 1.0
