"""The book of a saved model: the file beside its weights that holds its facts, and what it has remembered."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.errors import UserError
from dmt.memory import AssociativeMemory
from dmt.memory.facts import FactMemory
from dmt.models.architectures import architecture_of
from dmt.models.fingerprint import fingerprint
from dmt.models.overlay import Overlay, Part, lay_over, overlay_of
from dmt.records import Told
from dmt.store.ledger import Ledger, settled
from dmt.store.store import Store

BOOK = "memory.db"
"""The file beside a saved model's weights that holds its facts, and its rows where they are no longer those it was saved with."""


def overlay_in(store: Store, end: int | Sequence[int] | None) -> Overlay | None:
    """What the facts of a store are to be held by, still without any; None where it never had any.

    Args:
        end: token id that ends a document, or several.
    """
    ledger = Ledger(store)
    if not ledger.exists:
        return None
    settings, calibration = ledger.settings(), ledger.calibration()
    mean, metric = (torch.from_numpy(calibration[name]) for name in ("mean", "metric"))
    return Overlay(FactMemory(len(mean), mean, metric), settings["listens"], settings["answers"], end)


def parts_in(ledger: Ledger, known: Sequence[Told]) -> dict[int, list[Part]]:
    """Rows of facts as they are laid over a model, by the number of the fact."""
    ids, keys, values = ledger.states_of(known)
    at = {int(number): place for place, number in enumerate(ids)}
    states = [(torch.from_numpy(key), torch.from_numpy(value)) for key, value in zip(keys.copy(), values.copy(), strict=True)]
    return {fact.id: parts_of(fact, [states[at[row]] for row in fact.rows]) for fact in known}


def parts_of(fact: Told, states: Sequence[tuple[Tensor, Tensor]]) -> list[Part]:
    """Rows of one fact, whose keys and values are `states`."""
    return [
        Part(row, key, value, reach, fact.subject_ids, fact.answer_ids[:said], fact.answer_ids)
        for said, (row, reach, (key, value)) in enumerate(zip(fact.rows, fact.reach, states, strict=True))
    ]


def attach(model: PreTrainedModel, book: Path) -> None:
    """Let a model just loaded have what the book beside it says.

    Raises:
        UserError: the file is no book, or that of another model; of a model in half precision the latter cannot be told.
    """
    whole = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    try:
        store = Store(str(book), fingerprint(model) if whole else None, read_only=True)
    except UserError as error:
        if "another model" not in str(error) and "something else" not in str(error):
            raise
        raise UserError(f"{error}; {book} is not this model's book: move it elsewhere to load the model without") from None
    overlay = overlay_in(store, model.config.eos_token_id)
    if overlay is not None:
        overlay.origin, ledger = book.absolute(), Ledger(store)
        overlay.hold([part for parts in parts_in(ledger, ledger.read()).values() for part in parts])
        lay_over(model, overlay)
    spaces, there = {space.name: space for space in store.namespaces()}, settled(store)
    for layer, block in enumerate(architecture_of(model.config.model_type).blocks(model)):
        if isinstance(block, AssociativeMemory) and (name := f"layer_{layer}") in there:
            space = spaces[name]
            block.rows.rebuild(store.scan(space), expected=store.count(space))


def carry(model: PreTrainedModel, folder: Path) -> None:
    """Put a copy of the book that a model's facts come from into the folder it has been saved to.

    A book that is there already is put aside, whole, under another name.

    Raises:
        UserError: the book is not where it was.
    """
    overlay, there = overlay_of(model), folder / BOOK
    origin = None if overlay is None else overlay.origin
    if origin is not None and there.exists() and there.samefile(origin):
        return
    if origin is not None and not origin.is_file():
        raise UserError(f"{origin}, the book of this model's facts, is not there any more, so they cannot be saved with it")
    put_aside(folder, folder)
    if origin is not None:
        copy_book(origin, there)


def put_aside(before: Path, now: Path) -> None:
    """Keep the book that a folder `before` has in the folder `now`, under another name."""
    aside = f"memory.before-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 1_000_000}.db"
    for end in ("-wal", "-shm", ""):
        if (part := before / f"{BOOK}{end}").exists():
            part.rename(now / f"{aside}{end}")


def copy_book(source: Path, target: Path) -> None:
    """A database with all that was committed to it, whoever has it open."""
    with (
        closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)) as one,
        closing(sqlite3.connect(target)) as other,
    ):
        one.backup(other)
