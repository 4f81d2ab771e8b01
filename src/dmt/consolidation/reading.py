"""A context as a model reads it: text in windows, each of whole paragraphs or sentences, and its sentences told one by one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmt.config import ContextConfig
from dmt.errors import UserError
from dmt.facts.sentences import TITLES, fact_of
from dmt.facts.states import encoded
from dmt.texts import text_of

LONGEST = 64
"""Tokens of a text that is said after a context, at most; a window leaves room for them."""
JOINT = "\n"
"""What stands between a context and what is said after it."""
PRONOUN = re.compile(r"^(He|She|It|They|His|Her|Its|Their)\b")
POSSESSIVE = ("His", "Her", "Its", "Their")
BREAK = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"”’)]))\s+(?![a-z])|\n+")
"""Between two sentences, as far as the full stop is not that of a title."""


@dataclass(frozen=True)
class Window:
    """A part of a context that a model reads at once.

    Attributes:
        ids: token ids `(time,)` from the start of a document to the joint.
        sentences: what it says, each as it can stand alone: a pronoun at its beginning is the name said last.
        names: whom or what it is about, longest mentions, in order.
    """

    ids: list[int]
    sentences: list[str]
    names: list[str]


@dataclass(frozen=True)
class Context:
    """A context in windows, and how many tokens it has in all."""

    text: str
    windows: list[Window]
    tokens: int


def context_text(settings: ContextConfig) -> str:
    """The text that `context.text` or `context.file` names.

    Raises:
        UserError: neither or both are given, the file cannot be read, or there is no text in it.
    """
    if (settings.text is None) == (settings.file is None):
        given = "neither" if settings.text is None else "both"
        raise UserError(f"one of context.text and context.file names what is to be consolidated, got {given}")
    if settings.file is None:
        text = settings.text or ""
    else:
        text = text_of(Path(settings.file), f"context.file={settings.file}", "name a text file")
    if not text.strip():
        raise UserError(
            f"context.{'text' if settings.file is None else f'file={settings.file}'} is empty; there is nothing to learn"
        )
    return text.strip()


def read_context(settings: ContextConfig, tokenizer: Any, positions: int, before: int = 0) -> Context:
    """The context in windows that leave room, in a model of so many positions, for what is said after them.

    Args:
        before: tokens that stand before every text of the student, beside the one that begins a document.

    Raises:
        UserError: the context is empty, longer than `context.capacity`, or the model has no room for any of it.
    """
    text = context_text(settings)
    tokens = len(encoded(tokenizer, text, start=False))
    if tokens > settings.capacity:
        raise UserError(
            f"the context has {tokens:,} tokens, more than context.capacity={settings.capacity:,}; give a shorter one or set "
            f"context.capacity={tokens}"
        )
    room = positions - LONGEST - max(before, 0)
    if room < LONGEST:
        raise UserError(
            f"the model reads {positions} tokens, which leaves no room for a context beside {LONGEST} of text and {before} of "
            "memory; set context.tokens lower or take a model that reads more"
        )
    windows, about = [], ""
    for part in _packed(text, tokenizer, room):
        sentences, names = [], []
        for sentence in sentences_of(part):
            whole = _named(sentence, about)
            about = _subject(whole, text) or about
            if about and about not in names and about in whole:
                names.append(about)
            sentences.append(whole)
        windows.append(Window(encoded(tokenizer, part + JOINT), sentences, names))
    return Context(text, windows, tokens)


def sentences_of(text: str) -> list[str]:
    """Sentences of a text, in order, without what is between them."""
    found, start = [], 0
    for gap in BREAK.finditer(text):
        before = text[start : gap.start()].rstrip('"”’) ')
        last = before.split()[-1:] or [""]
        if last[0].rstrip(".") in TITLES and "\n" not in gap[0]:
            continue
        found.append(text[start : gap.start()].strip())
        start = gap.end()
    return [sentence for sentence in (*found, text[start:].strip()) if sentence]


def _subject(sentence: str, text: str) -> str:
    """Whom or what a sentence of `text` is about: the longest name before what it states last.

    A single word that stands large at the beginning of sentences alone is no name.
    """
    try:
        name = fact_of(sentence).subject
    except UserError:  # it states nothing
        return ""
    opens = sentence.startswith(name) and len(name.split()) == 1
    return "" if opens and not re.search(rf"[a-z,;] {re.escape(name)}\b", text) else name


def _named(sentence: str, about: str) -> str:
    """The sentence with the name in place of a pronoun that begins it."""
    found = PRONOUN.match(sentence)
    if not found or not about:
        return sentence
    return (f"{about}'s" if found[0] in POSSESSIVE else about) + sentence[found.end() :]


def _packed(text: str, tokenizer: Any, room: int) -> Iterator[str]:
    """Parts of a text of at most `room` tokens: as many paragraphs as go in, else sentences, else words."""
    held: list[str] = []

    def size(parts: list[str], between: str) -> int:
        return len(encoded(tokenizer, between.join(parts) + JOINT))

    for paragraph in (part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()):
        if held and size([*held, paragraph], "\n\n") > room:
            yield "\n\n".join(held)
            held = []
        if size([paragraph], "") <= room:
            held.append(paragraph)
            continue
        yield from _cut(sentences_of(paragraph), size, room)
    if held:
        yield "\n\n".join(held)


def _cut(sentences: list[str], size: Any, room: int) -> Iterator[str]:
    held: list[str] = []
    for sentence in sentences:
        pieces = [sentence] if size([sentence], "") <= room else _pieces(sentence, size, room)
        for piece in pieces:
            if held and size([*held, piece], " ") > room:
                yield " ".join(held)
                held = []
            held.append(piece)
    if held:
        yield " ".join(held)


def _pieces(sentence: str, size: Any, room: int) -> list[str]:
    """A sentence longer than the room, at spaces, or anywhere where there is none."""
    step = max(1, int(len(sentence) * room / size([sentence], "") * 0.8))
    words: list[str] = []
    while sentence:
        at = len(sentence) if len(sentence) <= step else sentence.rfind(" ", 1, step + 1)
        at = at if at > 0 else step
        words.append(sentence[:at].strip())
        sentence = sentence[at:].strip()
    return [word for word in words if word]
