"""A context into rows, in one pass without gradient steps: what it makes the model expect is written where it is expected."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.consolidation.asking import Question, answers
from dmt.consolidation.hearing import Hearing, after
from dmt.consolidation.telling import ANSWER
from dmt.data.encoding import start_of
from dmt.distill.signals import observe
from dmt.errors import UserError
from dmt.facts.book import Book
from dmt.facts.lines import RATE, Line, Outcome, reach_of, told_of
from dmt.facts.sentences import Fact, fact_of
from dmt.facts.states import batches, encoded, padded
from dmt.models.overlay import WINDOW, answers_of, silence

GAIN = 1.0
"""Nats by which a context has to make a token likelier for it to be something that was learnt."""
LIKELY = 0.01
"""Probability that the model with context has to give to a word's first token."""
SURE = 0.5
"""The same of texts that the model itself has said, which need not be true."""
WORDS = 4
"""Words of an answer, at most."""
FEW = 3
"""Words after which, about nobody in particular, it is no fact that somebody is spoken of."""
ENDS = re.compile(r"[.!?\n]")


@dataclass(frozen=True)
class Span:
    """What a context told about one place in a text: tokens `first` to `last` of `ids` are likelier with it."""

    ids: tuple[int, ...]
    first: int
    last: int
    prompt: str
    answer: str
    subject: str


def learnt(
    model: PreTrainedModel, hearing: Hearing, tokenizer: Any, texts: Sequence[list[int]], names: Sequence[str], sure: float = LIKELY
) -> list[Span]:
    """Where in `texts` (token ids) the model with context expects what it would not have expected without.

    Args:
        names: whom or what the context is about; a place that begins or completes a name tells nothing of its bearer.
        sure: least probability, with the context, of a word's first token.
    """
    start, spans = start_of(tokenizer), []
    for group in batches([len(text) for text in texts]):
        tokens = padded([texts[i] for i in group]).to(next(model.parameters()).device)
        with torch.no_grad(), silence(model):
            knowing = _nats(hearing.signals(tokens).logits, tokens)
            gains, likely = _nats(after(model, start, tokens).logits, tokens) - knowing, (-knowing).exp()
        for row, i in enumerate(group):
            here = slice(0, len(texts[i]) - 1)
            spans += _spans(texts[i], gains[row, here].tolist(), likely[row, here].tolist(), tokenizer, names, sure)
    return spans


def _nats(logits: Tensor, tokens: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none")


def _spans(
    ids: list[int], gains: list[float], likely: list[float], tokenizer: Any, names: Sequence[str], sure: float
) -> list[Span]:
    """Words that the context made likely, each with those after it that it did too; `gains[i]` is about token `i + 1`."""
    words = _words([tokenizer.decode(ids[at : at + 1]) for at in range(len(ids))])
    told = [max(gains[word[0] - 1 : word[-1]]) >= GAIN and likely[word[0] - 1] >= sure for word in words]
    found = []
    for number, word in enumerate(words):
        prompt, last = tokenizer.decode(ids[: word[0]]), number
        if not told[number] or _of_a_name(prompt, tokenizer.decode(ids[word[0] : word[-1] + 1]), names):
            continue
        while last + 1 < min(len(words), number + WORDS) and words[last][-1] + 1 == words[last + 1][0]:
            begins = tokenizer.decode(ids[words[last + 1][0] : words[last + 1][-1] + 1]).strip()[:1]
            whole = begins.isupper() or begins.isdigit()  # names and dates are said as a whole
            if not whole and (sure > LIKELY or not told[last + 1]):
                break
            last += 1
        answer, subject = tokenizer.decode(ids[word[0] : words[last][-1] + 1]), _subject(prompt, names)
        if subject or len(prompt.split()) > FEW or not answer.strip().startswith(tuple(names)):
            found.append(Span(tuple(ids), word[0], words[last][-1], prompt, answer, subject))
    return found


def _words(pieces: Sequence[str]) -> list[list[int]]:
    """Numbers of the tokens of each word but the first, without what ends a sentence."""
    words: list[list[int]] = []
    for at, piece in enumerate(pieces[1:], 1):
        if ENDS.search(piece):
            words.append([])
        elif piece[:1].isspace() or not words:
            words.append([at])
        elif words[-1]:
            words[-1].append(at)
    return [word for word in words if word and pieces[word[0]][:1].isspace()]


def _of_a_name(prompt: str, word: str, names: Sequence[str]) -> bool:
    """Whether a word is the rest of a name: that somebody of this name is there is no fact about anybody."""
    return any(
        prompt.endswith(name[:cut]) and name[cut:].startswith(word.rstrip(",;:'’s"))
        for name in names
        for cut in range(1, len(name))
        if name[cut].isspace()
    )


def _subject(prompt: str, names: Sequence[str]) -> str:
    """Whom a place is about: of the context's names the one said last, else nobody."""
    there = [(prompt.rfind(name), len(name), name) for name in names if name in prompt]
    return max(there)[2] if there else ""


@torch.no_grad()
def write_differences(
    book: Book, hearing: Hearing, spans: Sequence[Span], tag: str, source: str, wins: bool = True, rate: float = RATE
) -> list[Outcome]:
    """Write rows for `spans` into a book that has begun: each adds the difference that the context makes after a layer.

    In the last layer that gives what the model with the context says, exactly, wherever a row is read in the state in which
    it was written.

    Args:
        wins, rate: as in `Book.take`, `Calibration.reach`.
    """
    model, tokenizer, listens, speaks = book.model, book.tokenizer, book.overlay.listens, book.overlay.answers
    by_text: dict[tuple[int, ...], list[Span]] = {}
    for span in spans:
        by_text.setdefault(span.ids, []).append(span)
    texts, lines = sorted(by_text), []
    for group in batches([len(text) for text in texts]):
        tokens = padded([texts[i] for i in group]).to(next(model.parameters()).device)
        with silence(model):
            alone = after(model, start_of(tokenizer), tokens, blocks=True)
            knowing = hearing.signals(tokens, blocks=True)
        moved = (knowing.streams[speaks] - alone.streams[speaks]).float()
        heard = alone.block_inputs[listens].float()
        likely, before = (torch.exp(-_nats(seen.logits, tokens)) for seen in (knowing, alone))
        for row, i in enumerate(group):
            for span in by_text[texts[i]]:
                where = slice(span.first - 1, span.last)
                keys = heard[row, where].cpu()
                reach = reach_of(book.calibration, keys, rate, bool(span.subject))
                fact = Fact(span.prompt, span.answer, span.subject, tag, source)
                told = told_of(tokenizer, fact, span.ids[span.first : span.last + 1], reach)
                asks = book.calibration.compared(keys[:1])[0]
                lines.append(
                    Line(told, keys, moved[row, where].cpu(), asks, *(float(p[row, where].prod()) for p in (before, likely)))
                )
    return book.take(lines, wins)


def told_facts(
    model: PreTrainedModel,
    hearing: Hearing,
    tokenizer: Any,
    texts: Sequence[list[int]],
    names: Sequence[str],
    tag: str,
    source: str,
) -> list[Fact]:
    """Questions with answers (`telling.self_asked`) as facts: those that name whom they are about, and whose answer the model
    finds likelier with the context than without."""
    asked = [tokenizer.decode(text).partition(ANSWER) for text in texts]
    facts = [Fact(q + ANSWER.rstrip(), " " + a.strip(), _subject(q, names), tag, source) for q, _, a in asked if a.strip()]
    facts = [fact for fact in facts if fact.subject or not names]
    if not facts:
        return []
    questions, device = [Question(fact.prompt, fact.answer) for fact in facts], next(model.parameters()).device
    with silence(model):
        alone = answers(partial(after, model, start_of(tokenizer)), tokenizer, questions, device)
        knowing = answers(hearing.signals, tokenizer, questions, device)
    return [fact for fact, without, known in zip(facts, alone.nats, knowing.nats, strict=True) if without - known >= GAIN]


def stated(sentences: Sequence[str], names: Sequence[str], tag: str, source: str) -> list[Fact]:
    """What sentences state, of those that state something: a name, a number or the last word, as the answer to what precedes."""
    facts = []
    for sentence in sentences:
        try:
            fact = fact_of(sentence, tag=tag, source=source)
        except UserError:
            continue
        facts.append(replace(fact, subject=_subject(fact.prompt, names)))
    return facts


def said_lately(tokenizer: Any, prompt: str, subject: str) -> bool:
    """Whether a row that answers a prompt would still know whom it is about: named not too long before."""
    return not subject or len(encoded(tokenizer, prompt[prompt.rfind(subject) :], start=False)) < WINDOW


@torch.no_grad()
def spoken(book: Book, windows: Sequence[Tensor], ids: set[int]) -> set[int]:
    """Which of the facts `ids` answer in unrelated text, windows of token ids `(batch, time)`, where nobody asked for them."""
    rows = book.overlay.memory.rows.ids
    heard: set[int] = set()
    for tokens in windows:
        with answers_of(book.model) as noted:
            observe(book.model, tokens)
        heard |= {int(rows[row]) for each in noted for row in each.rows}
    return {number for number in ids if heard & set(book.known[number].rows)}
