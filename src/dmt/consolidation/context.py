"""Read a context: split it into chunks that fit the model, and into sentences with names."""

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
from dmt.text import USER_SUBJECT

MAX_TEXT_TOKENS = 64  # of a text after a context; a chunk leaves room for it
CONTEXT_SEPARATOR = "\n"  # between a context and the text after it
PRONOUN_PATTERN = re.compile(r"^(He|She|It|They|His|Her|Its|Their)\b")
POSSESSIVES = ("His", "Her", "Its", "Their")
# Between two sentences, unless the full stop belongs to a title.
SENTENCE_BREAK_PATTERN = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"”’)]))\s+(?![a-z])|\n+")


@dataclass(frozen=True)
class ContextChunk:
    """A part of a context that a model reads at once.

    Attributes:
        ids: token ids `(time,)` with the document prefix and the separator.
        sentences: its sentences; a pronoun at the beginning is replaced by the last name.
        names: its subjects in order, each in its longest form.
    """

    ids: list[int]
    sentences: list[str]
    names: list[str]


@dataclass(frozen=True)
class Context:
    """A context in chunks.

    Attributes:
        text: the whole text.
        chunks: its parts.
        num_tokens: number of tokens of the text.
    """

    text: str
    chunks: list[ContextChunk]
    num_tokens: int


def load_context_text(settings: ContextConfig) -> str:
    """Return the text of `context.text` or `context.file`.

    Raises:
        UserError: neither or both are set, the file cannot be read, or the text is empty.
    """
    if (settings.text is None) == (settings.file is None):
        provided = "neither" if settings.text is None else "both"
        raise UserError(
            f"set one of context.text and context.file, which name the context, got {provided}"
        )
    if settings.file is None:
        text = settings.text or ""
    else:
        text = read_text_file(
            Path(settings.file), f"context.file={settings.file}", "name a text file"
        )
    if not text.strip():
        name = "text" if settings.file is None else f"file={settings.file}"
        raise UserError(f"context.{name} is empty; give a text of one sentence or more")
    return text.strip()


def read_context(
    settings: ContextConfig, tokenizer: Any, max_positions: int, num_prefix_tokens: int = 0
) -> Context:
    """Return the context in chunks that leave room for a text after them.

    Args:
        settings: where the text is, and its maximum length.
        tokenizer: the model's tokenizer.
        max_positions: positions of the model.
        num_prefix_tokens: memory tokens in front of every text of the student.

    Raises:
        UserError: the context is empty or longer than `context.max_tokens`, or the model has too
            few positions for it.
    """
    text = load_context_text(settings)
    num_tokens = len(encode_text(tokenizer, text, add_prefix=False))
    if num_tokens > settings.max_tokens:
        raise UserError(
            f"the context has {num_tokens:,} tokens, more than context.max_tokens="
            f"{settings.max_tokens:,}; give a shorter one or set context.max_tokens={num_tokens}"
        )
    max_chunk_tokens = max_positions - MAX_TEXT_TOKENS - max(num_prefix_tokens, 0)
    if max_chunk_tokens < MAX_TEXT_TOKENS:
        raise UserError(
            f"the model has {max_positions} positions, which leaves no room for a context beside "
            f"{MAX_TEXT_TOKENS} tokens of text and {num_prefix_tokens} memory tokens; set "
            "context.prompt_length lower or use a model with more positions"
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
    """Return the sentences of a text in order, without the space between them."""
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
    """Return the subject of a sentence of `text`: the longest name before what it states last.

    A word that is capitalized only at the beginning of sentences is not a name.
    """
    try:
        name = parse_fact(sentence).subject
    except UserError:  # the sentence states no fact
        return ""
    if name == USER_SUBJECT:  # whoever speaks in a text is not its reader
        return ""
    is_sentence_start = sentence.startswith(name) and len(name.split()) == 1
    return (
        "" if is_sentence_start and not re.search(rf"[a-z,;] {re.escape(name)}\b", text) else name
    )


def _resolve_pronoun(sentence: str, subject: str) -> str:
    """Return the sentence with a pronoun at its beginning replaced by `subject`."""
    match = PRONOUN_PATTERN.match(sentence)
    if not match or not subject:
        return sentence
    return (f"{subject}'s" if match[0] in POSSESSIVES else subject) + sentence[match.end() :]


def _pack_paragraphs(text: str, tokenizer: Any, max_tokens: int) -> Iterator[str]:
    """Yield parts of at most `max_tokens`: whole paragraphs, else sentences, else words."""
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
    """Yield parts of at most `max_tokens`: whole sentences, else words."""
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
    """Split a sentence longer than `max_tokens` at spaces, or anywhere if it has none."""
    max_chars = max(1, int(len(sentence) * max_tokens / count_tokens([sentence], "") * 0.8))
    fragments: list[str] = []
    while sentence:
        cut = len(sentence) if len(sentence) <= max_chars else sentence.rfind(" ", 1, max_chars + 1)
        cut = cut if cut > 0 else max_chars
        fragments.append(sentence[:cut].strip())
        sentence = sentence[cut:].strip()
    return [fragment for fragment in fragments if fragment]
