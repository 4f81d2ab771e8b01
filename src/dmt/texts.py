"""Text files that a person names: read as UTF-8, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dmt.errors import UserError
from dmt.wording import shown


def text_of(path: Path, name: str, advice: str) -> str:
    """What a file says, without the mark that some editors begin it with.

    Args:
        name: what a refusal calls it, in the words that were typed.
        advice: what to do instead.

    Raises:
        UserError: it cannot be read, or is no UTF-8 text.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{name} is not UTF-8 text; convert it, or {advice}") from None
    except (OSError, RuntimeError, ValueError) as error:  # no such home folder; a NUL byte in a name
        raise UserError(f"{name} cannot be read ({getattr(error, 'strerror', None) or error}); {advice}") from None
    if "\0" in text:
        raise UserError(f"{name} holds NUL bytes, as UTF-16 and programs do; convert it to UTF-8, or {advice}")
    return text


def check_words(words: Iterable[str]) -> None:
    """Raise `UserError` for a word that was typed in another encoding than UTF-8: nothing could store, show or read it."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError(f"{shown(word)} is not UTF-8 text; type it in UTF-8, or rename what it names") from None


def json_of(line: str) -> Any:
    """What a line of JSON says.

    Raises:
        ValueError: it is none, or too deep, or holds half a character, which no tokenizer takes.
    """
    try:
        found = json.loads(line)
        json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("brackets within brackets") from None
    return found
