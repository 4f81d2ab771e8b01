"""Into memory: rows of a book beside a student, by the difference a context makes, by a gradient each, or trained."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dmt.consolidation.telling import own, sampled, self_asked
from dmt.consolidation.work import Work, train
from dmt.consolidation.writing import LIKELY, SURE, Span, learnt, said_lately, spoken, stated, told_facts, write_differences
from dmt.data.blocks import TextData, first_windows
from dmt.disk import whole_folder
from dmt.errors import Refused
from dmt.facts.book import Book
from dmt.facts.lines import Line
from dmt.facts.opening import open_book
from dmt.facts.sentences import Fact
from dmt.memory.facts import FactRows
from dmt.models.books import put_aside
from dmt.records import Told

TRIED = 16_384
"""Tokens of each corpus in which rows are listened for: one that answers there is taken out again."""


def into_memory(work: Work, student: PreTrainedModel, data: TextData, run: Path, fresh: bool) -> dict[str, Any]:
    """Write what the context says into the book of a student in `run`, which is there once all is written; what was written.

    Raises:
        UserError: the context says nothing that could be written.
    """
    with whole_folder(run / "student", put_aside) as folder:  # of a run that goes on all is written again, and the same
        return _written(work, student, data, run, fresh, folder)


def _written(work: Work, student: PreTrainedModel, data: TextData, run: Path, fresh: bool, folder: Path) -> dict[str, Any]:
    config = work.config
    by_gradient = config.context.write == "gradient"
    (work.base if work.base.config.model_type.startswith("dmt_") else student).save_pretrained(folder)
    work.tokenizer.save_pretrained(folder)
    tag = Path(config.context.file).stem if config.context.file else "context"
    source = config.context.file or "context.text"
    with closing(open_book(folder)) as book:
        there = set(book.known)
        spans = [([], []) if by_gradient else _spans(work, which) for which in range(len(work.hearings))]
        facts = [_facts(work, which, tag, source) if by_gradient else [] for which in range(len(work.hearings))]
        if not any(facts) and not any(map(any, spans)):
            raise Refused("the context tells this model nothing that it would not have said anyway, so there is nothing to write")
        book.begin([], answers=book.model.config.num_hidden_layers - 1)
        for which, hearing in enumerate(work.hearings):
            if by_gradient:
                book.write(facts[which])
            else:
                for each, wins in zip(spans[which], (True, False), strict=True):
                    write_differences(book, hearing, each, tag, source, wins)
        loose = spoken(book, _unrelated(work, data), set(book.known) - there)
        book.forget(sorted(loose), "evicted")
        mine = [fact for number, fact in book.known.items() if number not in there]
        if config.context.write == "trained" and mine:
            mine = _trained(work, book, data, run, fresh, mine)
    rows = sum(len(fact.rows) for fact in mine)
    size = rows * 2 * 4 * student.config.hidden_size
    return {"facts": len(mine), "rows": rows, "loose": len(loose), "bytes": size, "tag": tag}


def _names(work: Work) -> list[str]:
    """Whom or what the context is about."""
    return [name for window in work.context.windows for name in window.names]


def _spans(work: Work, which: int) -> tuple[list[Span], list[Span]]:
    """What one window told about places in its own sentences, and in what the model asked itself and went on with."""
    window, settings, names = work.context.windows[which], work.config.context, _names(work)
    seed, said, asked = work.config.seed * 101 + which, [], []
    if settings.objective == "generated":
        said = sampled(work.hearings[which], window, work.tokenizer, settings, seed)
        asked = self_asked(work.base, window, work.tokenizer, settings, seed)
    found = []
    for texts, sure in ((own(window, work.tokenizer), LIKELY), (asked, LIKELY), (said, SURE)):
        spans = learnt(work.base, work.hearings[which], work.tokenizer, texts, names, sure)
        found.append([span for span in spans if said_lately(work.tokenizer, span.prompt, span.subject)])
    more = [span for span in found[1] if span.subject or not names]
    return found[0], more + [span for span in found[2] if (span.subject or not names) and _stands(work, span)]


def _stands(work: Work, span: Span) -> bool:
    """Whether the context says so, in a sentence about the same: a model that goes on from it may say anything of anybody."""
    sentences = (sentence for window in work.context.windows for sentence in window.sentences)
    return any(span.subject in sentence and span.answer.strip(" ,;") in sentence for sentence in sentences)


def _facts(work: Work, which: int, tag: str, source: str) -> list[Fact]:
    """What a gradient each makes the model sure of: what it asked itself and could answer, and what sentences state."""
    window, settings, seed = work.context.windows[which], work.config.context, work.config.seed * 101 + which
    facts = stated(window.sentences, _names(work), tag, source)
    if settings.objective == "generated":
        asked = self_asked(work.base, window, work.tokenizer, settings, seed)
        facts = told_facts(work.base, work.hearings[which], work.tokenizer, asked, _names(work), tag, source) + facts
    return [fact for fact in facts if said_lately(work.tokenizer, fact.prompt, fact.subject)]


def _unrelated(work: Work, data: TextData) -> list[torch.Tensor]:
    """Training windows of every corpus, in which rows of a context should stay silent."""
    windows = [first_windows(corpus.train, TRIED) for corpus in data.corpora]
    return [part.to(work.device) for each in windows for part in each.split(work.config.data.micro_batch)]


def _trained(work: Work, book: Book, data: TextData, run: Path, fresh: bool, facts: list[Told]) -> list[Told]:
    """Train what rows of these facts add; in the end they are written anew."""
    memory = book.overlay.memory
    values = nn.Parameter(memory.rows.values.clone())
    own_rows = {row for fact in facts for row in fact.rows}
    mine = torch.tensor([int(row) in own_rows for row in memory.rows.ids])
    values.register_hook(lambda slope: slope * mine.unsqueeze(1))
    memory.rows = FactRows(**{**vars(memory.rows), "values": values})
    train(work, book.model, {"rows": values}, work.before, data, run, fresh)
    at = {int(row): place for place, row in enumerate(memory.rows.ids)}
    lines = []
    for fact in facts:
        parts = book.parts(fact.id)
        trained = torch.stack([values[at[part.row]].detach().cpu() for part in parts])
        keys = torch.stack([part.key for part in parts])
        lines.append(Line(replace(fact, id=0, rows=()), keys, trained, book.calibration.compared(keys[:1])[0], 0.0, 1.0))
    book.forget([fact.id for fact in facts], "replaced")
    return [outcome.fact for outcome in book.take(lines)]
