"""`dmt ask`: let a student speak, say which rows answered, let it remember what was said."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from dmt import inspection
from dmt.commands.changing import about
from dmt.commands.looking import namer, opened
from dmt.commands.printing import Output, check_seed, plainly
from dmt.errors import UserError
from dmt.facts.asking import ask as said_by
from dmt.facts.book import Book
from dmt.facts.exchange import hold
from dmt.facts.packs import load as load_pack
from dmt.facts.remembering import remember, settle_in
from dmt.models.books import BOOK
from dmt.models.fingerprint import fingerprint
from dmt.models.overlay import answers_of
from dmt.store import Store
from dmt.store.ledger import Ledger


def ask(given: argparse.Namespace, out: Output) -> None:
    """Let a student go on from a prompt; with `--trace` say what answered each token, with `--remember` keep it."""
    if given.tokens < 1 or not 0 <= given.temperature < math.inf:
        raise UserError(f"--tokens must be at least 1 and --temperature at least 0, got {given.tokens} and {given.temperature:g}")
    check_seed(given.seed)
    book, folder = opened(given, write=given.remember)
    if given.remember:
        settle_in(book.model, book.store)  # refused, where it cannot be, before anything is said
    if given.pack:
        hold(book, [load_pack(Path(place)) for place in given.pack], fingerprint(book.model))
    if not out.as_json:
        print(given.prompt, end="", flush=True)
    with answers_of(book.model) as answered:
        hear = None if out.as_json else (lambda text: print(plainly(text, "\n\t"), end="", flush=True))
        ids = said_by(book.model, book.tokenizer, given.prompt, given.tokens, given.temperature, given.seed, hear)
    out.line("")
    text = book.tokenizer.decode(ids, skip_special_tokens=True)
    found: dict[str, Any] = {"prompt": given.prompt, "text": text, "answer": text[len(given.prompt) :]}
    rows = [int(book.overlay.memory.rows.ids[row]) for each in answered for row in each.rows]
    facts = {fact.id: fact for fact in map(book.fact_of_row, rows)}
    found["facts"] = [about(fact) for fact in facts.values()]
    if given.trace:
        start = len(book.tokenizer(given.prompt, add_special_tokens=False)["input_ids"])
        reads = inspection.read(book.model, book.tokenizer, ids, given.most, given.lens, name=namer(book))
        reads = reads[max(0, start) : -1]  # what was read where each token of the answer was chosen
        out.line("")
        out.show(inspection.table(reads))
        for fact in facts.values():
            out.show(Text(f"fact {fact.id}, {fact.tag or 'no tag'}: {fact.sentence}"))
        found["trace"] = inspection.as_json(reads)
    if given.remember:
        found["remembered"] = _remember(given, book, ids, out)
    book.close()
    _note_uses(folder, rows)
    out.data(found)


def _note_uses(folder: Path, rows: list[int]) -> None:
    """Count the answers of facts, where nobody else is writing."""
    used = {row: rows.count(row) for row in set(rows) if row > 0}
    if not used:
        return
    try:
        with Store(str(folder / BOOK)) as store:
            Ledger(store).used(used)
    except UserError:
        pass  # somebody writes, or the place is read-only: an answer is not refused for a count


def _remember(given: argparse.Namespace, book: Book, ids: torch.Tensor, out: Output) -> dict[str, int]:
    assert book.store is not None, "opened for writing"
    done = remember(book.model, book.store, ids, given.tag)
    counts = f"{done.added} rows more, {done.merged} merged, {done.evicted} evicted; {done.rows:,} rows"
    out.line(f"remembered: {counts}, tag {given.tag!r}")
    return vars(done)
