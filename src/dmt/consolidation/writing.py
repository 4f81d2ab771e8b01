"""A context into rows, in one pass without gradient steps: what it makes the model expect is written where it is expected."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.consolidation.hearing import Hearing, after
from dmt.data.encoding import start_of
from dmt.facts.book import Book
from dmt.facts.calibration import Calibration
from dmt.facts.lines import RATE, Line, Outcome, reach_of
from dmt.facts.sentences import Fact, subject_of
from dmt.facts.states import batches, encoded, padded
from dmt.models.overlay import WINDOW, silence
from dmt.records import Told

GAIN = 1.0
"""Nats by which a context has to make a token likelier for it to be something that was learnt."""
LIKELY = 0.01
"""Probability that the model with context has to give to a word's first token."""
WORDS = 4
"""Words of an answer, at most."""
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
    model: PreTrainedModel, hearing: Hearing, tokenizer: Any, texts: Sequence[list[int]], names: Sequence[str]
) -> list[Span]:
    """Where in `texts` (token ids) the model with context expects what it would not have expected without.

    Args:
        names: whom or what the context is about; a place that begins or completes a name tells nothing of its bearer.
    """
    start, spans = start_of(tokenizer), []
    for group in batches([len(text) for text in texts]):
        tokens = padded([texts[i] for i in group]).to(next(model.parameters()).device)
        with torch.no_grad(), silence(model):
            knowing = _nats(hearing.signals(tokens).logits, tokens)
            gains, likely = _nats(after(model, start, tokens).logits, tokens) - knowing, (-knowing).exp()
        for row, i in enumerate(group):
            here = slice(0, len(texts[i]) - 1)
            spans += _spans(texts[i], gains[row, here].tolist(), likely[row, here].tolist(), tokenizer, names)
    return spans


def _nats(logits: Tensor, tokens: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none")


def _spans(ids: list[int], gains: list[float], likely: list[float], tokenizer: Any, names: Sequence[str]) -> list[Span]:
    """Words that the context made likely, each with those after it that it did too; `gains[i]` is about token `i + 1`."""
    words = _words([tokenizer.decode(ids[at : at + 1]) for at in range(len(ids))])
    told = [max(gains[word[0] - 1 : word[-1]]) >= GAIN and likely[word[0] - 1] >= LIKELY for word in words]
    found = []
    for number, word in enumerate(words):
        prompt, last = tokenizer.decode(ids[: word[0]]), number
        if not told[number] or _of_a_name(prompt, tokenizer.decode(ids[word[0] : word[-1] + 1]), names):
            continue
        while last + 1 < min(len(words), number + WORDS) and told[last + 1] and words[last][-1] + 1 == words[last + 1][0]:
            last += 1
        answer = tokenizer.decode(ids[word[0] : words[last][-1] + 1])
        found.append(Span(tuple(ids), word[0], words[last][-1], prompt, answer, _subject(prompt, names)))
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
    """Whom a place is about: of the context's names the one said last, else a name in the text, else nobody."""
    there = [(prompt.rfind(name), len(name), name) for name in names if name in prompt]
    return max(there)[2] if there else subject_of(prompt)


@torch.no_grad()
def differences(
    model: PreTrainedModel,
    hearing: Hearing,
    tokenizer: Any,
    spans: Sequence[Span],
    layers: tuple[int, int],
    calibration: Calibration,
    tag: str,
    source: str,
    rate: float = RATE,
) -> list[Line]:
    """Rows for `spans`, heard and answered in `layers`: each adds the difference that the context makes after the second.

    In the last layer that gives what the model with the context says, exactly, wherever a row is read in the state in
    which it was written.
    """
    listens, speaks = layers
    start, lines = start_of(tokenizer), []
    texts = sorted({span.ids for span in spans})
    by_text: dict[tuple[int, ...], list[Span]] = {text: [] for text in texts}
    for span in spans:
        by_text[span.ids].append(span)
    for group in batches([len(text) for text in texts]):
        tokens = padded([texts[i] for i in group]).to(next(model.parameters()).device)
        with silence(model):
            alone = after(model, start, tokens, blocks=True)
            knowing = hearing.signals(tokens, blocks=True)
        moved = (knowing.streams[speaks] - alone.streams[speaks]).float()
        heard = alone.block_inputs[listens].float()
        likely, before = (torch.exp(-_nats(seen.logits, tokens)) for seen in (knowing, alone))
        for row, i in enumerate(group):
            for span in by_text[texts[i]]:
                where = slice(span.first - 1, span.last)
                keys = heard[row, where].cpu()
                told = _told(tokenizer, span, reach_of(calibration, keys, rate, bool(span.subject)), tag, source)
                sure = (float(each[row, where].prod()) for each in (before, likely))
                lines.append(Line(told, keys, moved[row, where].cpu(), calibration.compared(keys[:1])[0], *sure))
    return lines


def _told(tokenizer: Any, span: Span, reach: Tensor, tag: str, source: str) -> Told:
    ways = {tuple(encoded(tokenizer, way, start=False)) for way in (span.subject, " " + span.subject) if span.subject}
    answer = span.ids[span.first : span.last + 1]
    return Told(
        0,
        span.prompt,
        span.answer,
        span.subject,
        tag,
        source,
        time.time(),
        tuple(sorted(ways)),
        answer,
        reach=tuple(reach.tolist()),
    )


def facts_in(spans: Sequence[Span], tag: str, source: str) -> list[Fact]:
    """Spans as facts that one gradient each can write (`Book.write`)."""
    return [
        Fact(span.prompt, span.answer, span.subject, tag, source) for span in spans if span.prompt.strip() and span.answer.strip()
    ]


def near_enough(tokenizer: Any, span: Span) -> bool:
    """Whether a row for the span would still know whom it is about: named not too long before."""
    if not span.subject:
        return True
    at = span.prompt.rfind(span.subject)
    return len(encoded(tokenizer, span.prompt[at:], start=False)) < WINDOW


def write_differences(
    book: Book, hearing: Hearing, spans: Sequence[Span], tag: str, source: str, rate: float = RATE
) -> list[Outcome]:
    """Write rows for `spans` into a book that has begun, as the difference the context makes."""
    layers = book.overlay.listens, book.overlay.answers
    with silence(book.model):
        lines = differences(book.model, hearing, book.tokenizer, spans, layers, book.calibration, tag, source, rate)
    return book.take(lines)
