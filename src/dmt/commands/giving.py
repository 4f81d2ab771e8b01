"""`dmt memory export | import | merge | diff`: what goes from one book to another."""

from __future__ import annotations

import argparse
from pathlib import Path

from dmt.commands.changing import about, check_rows, choose, tell_counts
from dmt.commands.looking import opened
from dmt.commands.printing import Output
from dmt.errors import UserError
from dmt.facts import packs, rowpacks
from dmt.facts.containers import is_pack
from dmt.facts.exchange import check_fits, diff, merge, packed, take_in
from dmt.facts.opening import open_book, student_folder
from dmt.facts.rowpacks import packed_rows, take_rows
from dmt.models.books import BOOK
from dmt.models.fingerprint import fingerprint
from dmt.records import Told
from dmt.store import Store
from dmt.store.ledger import Ledger

SHOWN = 20
"""Facts that are shown of each kind."""


def export(given: argparse.Namespace, out: Output) -> None:
    """Put facts into a pack."""
    place = Path(given.pack)
    if place.exists():
        raise UserError(f"{place} is there already; give a new name, or remove it first")
    check_rows(given)
    book, _ = opened(given)
    if given.rows:
        rows = packed_rows(
            book.model, fingerprint(book.model), given.name or place.stem, given.licence, set(given.id or ()), given.tag
        )
        rowpacks.save(rows, place)
        out.line(f"{place}: {sum(rows.manifest['counts'].values()):,} rows of associative memory")
        out.data(rows.manifest)
        return
    facts = choose(book, given)
    if not facts:
        raise UserError("no fact is like that, so there is nothing to export; dmt memory list shows what there is")
    pack = packed(book, facts, given.name or place.stem, given.licence, fingerprint(book.model))
    packs.save(pack, place)
    size = sum(file.stat().st_size for file in (place.iterdir() if place.is_dir() else [place]))
    out.line(f"{place}: {len(facts):,} facts in {pack.manifest['counts']['rows']:,} rows, {size:,} bytes")
    out.data(pack.manifest | {"bytes": size})


def take(given: argparse.Namespace, out: Output) -> None:
    """Write a pack's facts into a student's book."""
    place = Path(given.pack)
    if rowpacks.is_of_rows(place):
        rows = rowpacks.load(place)
        with open_book(student_folder(given.student)) as book:
            came, left = take_rows(book.model, book.store, rows, fingerprint(book.model))
        out.line(f"{came:,} rows taken in, {left:,} left for them")
        out.data({"rows": came, "left": left})
        return
    pack = packs.load(place)
    with open_book(student_folder(given.student)) as book:
        model = fingerprint(book.model)
        check_fits(pack, book, model, place)
        if not book.known:
            out.note("a book's first facts are preceded by a measurement of some seconds")
        outcomes = take_in(book, pack, model)
    counts = tell_counts(outcomes, out)
    for each in [each for each in outcomes if each.old is not None][:SHOWN]:
        assert each.old is not None
        out.line(f"fact {each.fact.id} {each.fact.sentence!r} replaces {each.old.id} {each.old.sentence!r}")
    out.data(counts | {"facts": [about(each.fact) for each in outcomes]})


def merged(given: argparse.Namespace, out: Output) -> None:
    """Make one pack of several and report where they contradict each other."""
    place = Path(given.output)
    if place.exists():
        raise UserError(f"{place} is there already; give a new name, or remove it first")
    pack, conflicts = merge([packs.load(Path(name)) for name in given.packs], given.name or place.stem, given.prefer)
    packs.save(pack, place)
    out.line(f"{place}: {pack.manifest['counts']['facts']:,} facts, {len(conflicts):,} contradictions")
    columns = ("asked", "kept", "left out")
    rows = [(kept.prompt, kept.answer.strip(), left.answer.strip()) for kept, left in conflicts]
    if rows:
        out.table(columns, rows[:SHOWN], "")
    out.data(pack.manifest | {"conflicts": [{"kept": about(kept), "left out": about(left)} for kept, left in conflicts]})


def compared(given: argparse.Namespace, out: Output) -> None:
    """What differs between two packs, students or runs."""
    found = diff(facts_in(given.first), facts_in(given.second))
    out.line(
        f"{found.same:,} the same, {len(found.different):,} answered differently, {len(found.only_first):,} only in "
        f"{given.first}, {len(found.only_second):,} only in {given.second}"
    )
    rows = [(one.prompt, one.answer.strip(), other.answer.strip()) for one, other in found.different]
    rows += [(fact.prompt, fact.answer.strip(), "") for fact in found.only_first]
    rows += [(fact.prompt, "", fact.answer.strip()) for fact in found.only_second]
    if rows:
        out.table(("asked", "first", "second"), rows[: given.limit], "")
    if len(rows) > given.limit:
        out.note(f"{len(rows) - given.limit:,} more; --limit {len(rows)} shows all")
    out.data({
        "same": found.same, "different": [[about(one), about(other)] for one, other in found.different],
        "only_first": [about(fact) for fact in found.only_first], "only_second": [about(fact) for fact in found.only_second],
    })  # fmt: skip


def facts_in(name: str) -> list[Told]:
    """Facts of a pack, or of the book of a student or run; no model is loaded.

    Raises:
        UserError: it is none of them.
    """
    place = Path(name)
    if is_pack(place):
        return packs.load(place).facts
    book = student_folder(place) / BOOK
    if not book.is_file():
        return []
    ledger = Ledger(Store(str(book), read_only=True))
    return ledger.read() if ledger.exists else []
