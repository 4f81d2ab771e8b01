"""Text as people write it: forms that mean the same, and languages without spaces."""

from __future__ import annotations

import re
import unicodedata

# Quotation marks and apostrophes that stand for a plain one, and hyphens for a plain one.
PLAIN_MARKS = str.maketrans("‘’ʼ′`´“”„«»‐‑", "''''''\"\"\"\"\"--")
SENTENCE_ENDS = ".!?…。！？．｡"
WORD_PATTERN = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
# Between the values of a list; `add_to_list` writes the first, or the last in unspaced scripts.
LIST_SEPARATOR_PATTERN = re.compile(r"(, and |, | and |、)")
USER_SUBJECT = "the user"  # whom statements in the first person are about
# Lower case or with a capital, but not in capitals: "US" is a country.
FIRST_PERSON = frozenset(
    form
    for word in (
        *("i", "me", "my", "mine", "myself", "i'm", "i've", "i'd", "i'll"),
        *("we", "us", "our", "ours", "ourselves", "we're", "we've", "we'd", "we'll"),
    )
    for form in (word, word.capitalize())
)
# Scripts that are written without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, Chinese
# and Japanese with their punctuation.
UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"
    "\U00020000-\U0003ffff]"
)


def fold_text(text: str) -> str:
    """Return a text such that texts that mean the same are equal.

    Case, spaces, composed and decomposed letters, and the shape of quotes and hyphens are folded.
    """
    folded = unicodedata.normalize("NFC", text).translate(PLAIN_MARKS).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).split())


def is_first_person(word: str) -> bool:
    """Check whether a word is one with which people speak of themselves."""
    return word.translate(PLAIN_MARKS) in FIRST_PERSON


def mentions_user(text: str) -> bool:
    """Check whether a text speaks of the user, in the first person or as `USER_SUBJECT`."""
    is_named = re.search(rf"\b{USER_SUBJECT}\b", fold_text(text)) is not None
    return is_named or any(map(is_first_person, WORD_PATTERN.findall(text)))


def name_user(text: str) -> str:
    """Return a text in which the first person is `USER_SUBJECT`, in the third person."""

    def replace(match: re.Match[str]) -> str:
        word, _, ending = match[0].translate(PLAIN_MARKS).lower().partition("'")
        if not is_first_person(match[0]):
            return match[0]
        verb = {"m": " is", "re": " is", "ve": " has", "d": " would", "ll": " will"}.get(ending, "")
        owner = "'s" if word in ("my", "mine", "our", "ours") else ""
        return f"{USER_SUBJECT}{owner}{verb}"

    return WORD_PATTERN.sub(replace, text)


def find_closing(answer: str, text: str) -> str:
    """Return the marks after an answer.

    Args:
        answer: as it is stored.
        text: the same with the marks, as it is generated.
    """
    marks, own_marks = (part[len(part.rstrip(SENTENCE_ENDS)) :] for part in (text, answer))
    return marks.removeprefix(own_marks)


def add_to_list(text: str, value: str) -> str:
    """Return a list with one value more, after the values of `text`."""
    separator = ", " if join_with_space(text, value) else "、"
    return text + separator + value


def remove_from_list(text: str, value: str) -> str | None:
    """Return a list without a value; None where the value is not in it.

    Args:
        text: values with commas or "and" between them; other text stays as it is.
        value: one of them, however it is written; it may hold separators itself.
    """
    parts = LIST_SEPARATOR_PATTERN.split(text)  # values at even indices, separators at odd ones
    folded = fold_text(value)
    for start in range(0, len(parts), 2):
        for stop in range(start + 1, len(parts) + 1, 2):
            if fold_text("".join(parts[start:stop])) == folded:
                rest = parts[: start - 1] + parts[stop:] if start else parts[stop + 1 :]
                return "".join(rest)
            if not folded.startswith(fold_text(parts[start])):
                break
    return None


def join_with_space(prompt: str, answer: str) -> str:
    """Return what stands between two texts that were given apart: a space, where one is written."""
    is_unspaced = UNSPACED.match(prompt[-1:]) or UNSPACED.match(answer[:1])
    return "" if is_unspaced else " "
