"""`dmt memory write | forget | restore | evict`: what changes a student's book."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dmt.commands.printing import Output
from dmt.errors import UserError
from dmt.facts.book import Book
from dmt.facts.lines import Outcome
from dmt.facts.opening import open_book, student_folder
from dmt.facts.remembering import drop_rows, rows_about
from dmt.facts.sentences import Fact, fact_of, read_facts
from dmt.models.surgery import associative_of
from dmt.records import Told
from dmt.texts import text_of

SURE_ENOUGH = 0.5
"""Probability of an answer below which a person is told that it may not be said."""
CALIBRATION_TEXT = 100_000
"""Characters of a file of one's own that are read for calibration, at least 2,000."""


def write(given: argparse.Namespace, out: Output) -> None:
    """Write facts from a sentence, from its parts, or from a file of them."""
    facts = _facts(given)
    if not 0 < given.rate <= 0.5:
        raise UserError(f"--rate must be in (0, 0.5], got {given.rate:g}; it is the share of places that may answer unasked")
    folder = student_folder(given.student)
    with open_book(folder) as book:
        began = time.perf_counter()
        book.begin(facts, prose=_prose(given.calibrate_on), told=out.note)
        began_writing = time.perf_counter()
        with out.progress("writing", len(facts)) as progress:
            outcomes = book.write(facts, given.rate, progress)
        seconds = time.perf_counter() - began_writing
    _tell(outcomes, out)
    out.note(
        f"{len(facts) / max(seconds, 1e-9):,.0f} facts a second; {began_writing - began:.1f} s to begin; book: {folder}/memory.db"
    )
    out.data([{"what": each.what, "before": each.before, "likely": each.likely, "fact": about(each.fact),
               "old": None if each.old is None else about(each.old)} for each in outcomes])  # fmt: skip


def _facts(given: argparse.Namespace) -> list[Fact]:
    if given.file is not None:
        if given.sentence is not None or given.prompt is not None or given.answer is not None or given.subject is not None:
            raise UserError("--file has its own sentences; leave out the sentence, --prompt, --answer and --subject")
        facts = list(read_facts(Path(given.file), given.tag, given.source))
        if not facts:
            raise UserError(f'{given.file} holds no facts; a line is an object such as {{"sentence": "Paris is in France."}}')
        return facts
    return [fact_of(given.sentence, given.prompt, given.answer, given.subject, given.tag, given.source)]


def _prose(file: str | None) -> list[str] | None:
    if file is None:
        return None
    text = text_of(Path(file), f"--calibrate-on {file}", "name a text file")[:CALIBRATION_TEXT]
    if len(text) < 2_000:
        raise UserError(f"--calibrate-on {file} has {len(text):,} characters; give 2,000 or more of text the facts are not about")
    return [text]


def _tell(outcomes: list[Outcome], out: Output) -> None:
    if len(outcomes) == 1:
        fact = outcomes[0].fact
        out.line(
            f"fact {fact.id}: {fact.prompt!r} is answered {fact.answer!r}" + (f", about {fact.subject!r}" if fact.subject else "")
        )
        if not fact.subject:
            out.line("it is about nobody in particular, so it answers whoever asks in nearly these words; --subject names somebody")
        if outcomes[0].what == "known":
            out.line("it was known already; nothing was written")
        else:
            out.line(f"probability of the answer {outcomes[0].before:.2g} -> {outcomes[0].likely:.2g}, {len(fact.rows)} rows")
            if outcomes[0].likely < SURE_ENOUGH:
                out.line("that is not enough to be said: the model hardly knows some part of it; dmt memory show tells which")
        if outcomes[0].old is not None:
            old = outcomes[0].old
            out.line(
                f"it contradicts fact {old.id} ({old.sentence!r}), which it replaces; dmt memory restore {old.id} brings that back"
            )
        return
    tell_counts(outcomes, out)
    unsure = [each.fact for each in outcomes if each.what != "known" and each.likely < SURE_ENOUGH]
    if unsure:
        out.line(
            f"{len(unsure):,} of them will hardly be said even where they were written, since the model hardly knows some part:"
        )
    for fact in unsure[:20]:
        out.line(f"  fact {fact.id}: {fact.sentence!r}")


def tell_counts(outcomes: list[Outcome], out: Output) -> dict[str, int]:
    """Say, and give, what became of many facts."""
    counts = {what: sum(each.what == what for each in outcomes) for what in ("written", "replaced", "known")}
    out.line(
        f"{counts['written']:,} written, {counts['replaced']:,} written in place of one that they contradict, {counts['known']:,} "
        "known already"
    )
    return counts


def forget(given: argparse.Namespace, out: Output) -> None:
    """Take facts, or rows of associative memory, out of a student."""
    folder = student_folder(given.student)
    if not (given.id or given.tag is not None or given.query):
        raise UserError("forget what? give --id, --tag or --query; dmt memory list shows what there is")
    check_rows(given)
    with open_book(folder) as book:
        if given.rows:
            gone = drop_rows(book.model, book.store, set(given.id) if given.id else None, given.tag)
            shared = sum(given.tag in row["tag"].split("\n") for row in rows_about(book.model))
            out.line(f"{gone:,} rows forgotten" + (f"; {shared:,} stay, in which something else is too" if shared else ""))
            out.data({"rows": gone, "shared": shared})
            return
        chosen = choose(book, given)
        if not chosen:
            raise UserError("no fact is like that, so nothing was forgotten; dmt memory list shows what there is")
        gone_facts = book.forget([fact.id for fact in chosen])
    for fact in gone_facts[:20]:
        out.line(f"forgot fact {fact.id}: {fact.sentence!r}")
    if len(gone_facts) > 20:
        out.line(f"... and {len(gone_facts) - 20:,} more")
    out.line(f"{len(gone_facts):,} forgotten; dmt memory restore ID brings one back")
    out.data([about(fact) for fact in gone_facts])


def check_rows(given: argparse.Namespace) -> None:
    """Raise `UserError` where rows are asked for by words: they have none, and none asked for must not mean all."""
    if given.rows and given.query is not None:
        raise UserError("rows of associative memory have no words to be found by; leave --query out and give --id or --tag")


def choose(book: Book, given: argparse.Namespace) -> list[Told]:
    """Facts that are there and have every property asked for: --id, --tag, --query; all where none is."""
    wanted = set(given.id or ())
    if missing := sorted(wanted - set(book.known)):
        raise UserError(f"fact {missing[0]} is not there; dmt memory list shows the {len(book.known):,} that are")
    return matching(book.known.values(), given)


def matching(facts: Iterable[Told], given: argparse.Namespace) -> list[Told]:
    """Of `facts` those that have every property asked for."""
    wanted, words = set(given.id or ()), (given.query or "").lower().split()
    return [
        fact for fact in facts
        if (not wanted or fact.id in wanted)
        and (given.tag is None or fact.tag == given.tag)
        and all(word in f"{fact.sentence} {fact.subject}".lower() for word in words)
    ]  # fmt: skip


def restore(given: argparse.Namespace, out: Output) -> None:
    """Bring a fact back that was forgotten, replaced or evicted."""
    with open_book(student_folder(given.student)) as book:
        fact, against = book.restore(given.number)
    out.line(f"fact {fact.id} is back: {fact.sentence!r}")
    for other in against:
        out.line(f"it replaces fact {other.id}: {other.sentence!r}")
    out.data({"fact": about(fact), "replaces": [about(other) for other in against]})


def evict(given: argparse.Namespace, out: Output) -> None:
    """Keep the facts, or rows, that are used most lately; take out the others."""
    if given.keep < 0:
        raise UserError(f"--keep must be 0 or more, got {given.keep}")
    with open_book(student_folder(given.student)) as book:
        if given.rows:
            if not associative_of(book.model):
                raise UserError("this student has no associative memory, so there are no rows to evict; leave --rows out")
            gone = drop_rows(book.model, book.store, keep=lambda _: given.keep)
            out.line(f"{gone:,} rows evicted")
            out.data({"rows": gone})
            return
        left = book.evict(given.keep)
        out.line(f"{len(left):,} facts evicted, {len(book.known):,} kept; dmt memory restore ID brings one back")
    out.data([about(fact) for fact in left])


def about(fact: Told) -> dict[str, Any]:
    """A fact as programs read it."""
    left_out = ("subject_ids", "answer_ids", "reach", "rows")
    return {name: value for name, value in asdict(fact).items() if name not in left_out} | {"rows": list(fact.rows)}
