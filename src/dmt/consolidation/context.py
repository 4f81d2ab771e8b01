"""A context as a model reads it: text in windows, each of whole paragraphs or sentences, and its sentences told one by one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmt.config import ContextConfig
from dmt.editing.fact import TITLES, parse_fact
from dmt.errors import UserError
from dmt.files import read_text_file
from dmt.models.forward import encode_text

MAX_TEXT_TOKENS = 64
"""Tokens of a text that is said after a context, at most; a window leaves room for them."""
CONTEXT_SEPARATOR = "\n"
"""What stands between a context and what is said after it."""
PRONOUN_PATTERN = re.compile(r"^(He|She|It|They|His|Her|Its|Their)\b")
POSSESSIVES = ("His", "Her", "Its", "Their")
SENTENCE_BREAK_PATTERN = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"”’)]))\s+(?![a-z])|\n+")
"""Between two sentences, as far as the full stop is not that of a title."""


@dataclass(frozen=True)
class ContextChunk:
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
    chunks: list[ContextChunk]
    num_tokens: int


def load_context_text(settings: ContextConfig) -> str:
    """The text that `context.text` or `context.file` names.

    Raises:
        UserError: neither or both are given, the file cannot be read, or there is no text in it.
    """
    if (settings.text is None) == (settings.file is None):
        provided = "neither" if settings.text is None else "both"
        raise UserError(
            f"one of context.text and context.file names what is to be consolidated, got {provided}"
        )
    if settings.file is None:
        text = settings.text or ""
    else:
        text = read_text_file(
            Path(settings.file), f"context.file={settings.file}", "name a text file"
        )
    if not text.strip():
        raise UserError(
            f"context.{'text' if settings.file is None else f'file={settings.file}'} is empty; there is nothing to learn"
        )
    return text.strip()


def read_context(
    settings: ContextConfig, tokenizer: Any, max_positions: int, num_prefix_tokens: int = 0
) -> Context:
    """The context in windows that leave room, in a model of so many positions, for what is said after them.

    Args:
        before: tokens that stand before every text of the student, beside the one that begins a document.

    Raises:
        UserError: the context is empty, longer than `context.max_tokens`, or the model has no room for any of it.
    """
    text = load_context_text(settings)
    num_tokens = len(encode_text(tokenizer, text, add_prefix=False))
    if num_tokens > settings.max_tokens:
        raise UserError(
            f"the context has {num_tokens:,} tokens, more than context.max_tokens={settings.max_tokens:,}; give a shorter one or set "
            f"context.max_tokens={num_tokens}"
        )
    max_chunk_tokens = max_positions - MAX_TEXT_TOKENS - max(num_prefix_tokens, 0)
    if max_chunk_tokens < MAX_TEXT_TOKENS:
        raise UserError(
            f"the model reads {max_positions} tokens, which leaves no room for a context beside {MAX_TEXT_TOKENS} of text and {num_prefix_tokens} of "
            "memory; set context.prompt_length lower or take a model that reads more"
        )
    chunks, subject = [], ""
    for chunk_text in _pack_paragraphs(text, tokenizer, max_chunk_tokens):
        sentences, names = [], []
        for sentence in split_sentences(chunk_text):
            resolved = _resolve_pronoun(sentence, subject)
            subject = _extract_subject(resolved, text) or subject
            if subject and subject not in names and subject in resolved:
                names.append(subject)
            sentences.append(resolved)
        chunks.append(
            ContextChunk(encode_text(tokenizer, chunk_text + CONTEXT_SEPARATOR), sentences, names)
        )
    return Context(text, chunks, num_tokens)


def split_sentences(text: str) -> list[str]:
    """Sentences of a text, in order, without what is between them."""
    sentences, start = [], 0
    for gap in SENTENCE_BREAK_PATTERN.finditer(text):
        preceding = text[start : gap.start()].rstrip('"”’) ')
        last_word = preceding.split()[-1:] or [""]
        if last_word[0].rstrip(".") in TITLES and "\n" not in gap[0]:
            continue
        sentences.append(text[start : gap.start()].strip())
        start = gap.end()
    return [sentence for sentence in (*sentences, text[start:].strip()) if sentence]


def _extract_subject(sentence: str, text: str) -> str:
    """Whom or what a sentence of `text` is about: the longest name before what it states last.

    A single word that stands large at the beginning of sentences alone is no name.
    """
    try:
        name = parse_fact(sentence).subject
    except UserError:  # it states nothing
        return ""
    is_sentence_start = sentence.startswith(name) and len(name.split()) == 1
    return (
        "" if is_sentence_start and not re.search(rf"[a-z,;] {re.escape(name)}\b", text) else name
    )


def _resolve_pronoun(sentence: str, subject: str) -> str:
    """The sentence with the name in place of a pronoun that begins it."""
    match = PRONOUN_PATTERN.match(sentence)
    if not match or not subject:
        return sentence
    return (f"{subject}'s" if match[0] in POSSESSIVES else subject) + sentence[match.end() :]


def _pack_paragraphs(text: str, tokenizer: Any, max_tokens: int) -> Iterator[str]:
    """Parts of a text of at most `room` tokens: as many paragraphs as go in, else sentences, else words."""
    buffer: list[str] = []

    def count_tokens(parts: list[str], separator: str) -> int:
        return len(encode_text(tokenizer, separator.join(parts) + CONTEXT_SEPARATOR))

    for paragraph in (part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()):
        if buffer and count_tokens([*buffer, paragraph], "\n\n") > max_tokens:
            yield "\n\n".join(buffer)
            buffer = []
        if count_tokens([paragraph], "") <= max_tokens:
            buffer.append(paragraph)
            continue
        yield from _pack_sentences(split_sentences(paragraph), count_tokens, max_tokens)
    if buffer:
        yield "\n\n".join(buffer)


def _pack_sentences(sentences: list[str], count_tokens: Any, max_tokens: int) -> Iterator[str]:
    buffer: list[str] = []
    for sentence in sentences:
        fragments = (
            [sentence]
            if count_tokens([sentence], "") <= max_tokens
            else _split_sentence(sentence, count_tokens, max_tokens)
        )
        for fragment in fragments:
            if buffer and count_tokens([*buffer, fragment], " ") > max_tokens:
                yield " ".join(buffer)
                buffer = []
            buffer.append(fragment)
    if buffer:
        yield " ".join(buffer)


def _split_sentence(sentence: str, count_tokens: Any, max_tokens: int) -> list[str]:
    """A sentence longer than the room, at spaces, or anywhere where there is none."""
    max_chars = max(1, int(len(sentence) * max_tokens / count_tokens([sentence], "") * 0.8))
    fragments: list[str] = []
    while sentence:
        cut = len(sentence) if len(sentence) <= max_chars else sentence.rfind(" ", 1, max_chars + 1)
        cut = cut if cut > 0 else max_chars
        fragments.append(sentence[:cut].strip())
        sentence = sentence[cut:].strip()
    return [fragment for fragment in fragments if fragment]
