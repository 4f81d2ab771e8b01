"""Names in a text: those of stored subjects, and those that look like names."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Set
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from dmt.text import UNSPACED, fold_text

WORDS_FILE = "words.json"


def load_words(name: str) -> frozenset[str]:
    """Return a list of English words by its name in `assets/words.json`."""
    text = files("dmt").joinpath("assets", WORDS_FILE).read_text(encoding="utf-8")
    return frozenset(json.loads(text)[name])


AROUND = 60  # characters before and after a mention that show how a text is written
MAX_UNSPACED_NAME = 12  # characters of a name in a script without spaces
OPENING, CLOSING = "\"'“”„«»‘’([{<*_#-–—", "\"'“”„«»‘’)]}>*_,.;:!?…-–—"
CHUNK = re.compile(r"\S+")
POSSESSIVE = re.compile(r"(?:['’ʼ′]s|(?<=s)['’])$", re.IGNORECASE)
# What stands between a noun and the name that it governs.
GOVERNED = re.compile(r"\s+(of|in|from|to|at|with)\s+(the\s+)?")
# Words that begin with a capital letter at the start of a sentence without being names.
SENTENCE_STARTERS = load_words("sentence_starters")
# Names that end as adverbs, participles or plurals do.
NAMES_LIKE_WORDS = load_words("names_like_words")
# Capitalized in English anywhere, and no name of anybody.
NON_NAMES = load_words("non_names")
TITLES = load_words("titles")
# Names that are words as well: in lower case they are the words.
COMMON_WORDS = load_words("common_words")


@dataclass(frozen=True)
class Mention:
    """A name in a text.

    Attributes:
        start: of the first character.
        end: behind the last one.
        name: folded; empty for a name of no stored subject.
    """

    start: int
    end: int
    name: str = ""


@dataclass(frozen=True)
class _Chunk:
    """Characters between two spaces.

    Attributes:
        start: of its core, without quotes and brackets.
        end: behind its core, without punctuation.
        full_start: of the whole chunk.
        full_end: behind the whole chunk.
        text: the core.
        owner_end: behind the core without a possessive ending.
    """

    start: int
    end: int
    full_start: int
    full_end: int
    text: str
    owner_end: int


def _split_chunks(text: str) -> list[_Chunk]:
    chunks = []
    for match in CHUNK.finditer(text):
        raw = match[0]
        start = len(raw) - len(raw.lstrip(OPENING))
        end = len(raw.rstrip(CLOSING))
        if end <= start:
            start, end = 0, len(raw)
        core = raw[start:end]
        possessive = POSSESSIVE.search(core)
        owner_end = end
        if possessive:
            owner_end = start + len(core[: possessive.start()].rstrip(CLOSING))
        begin = match.start()
        chunks.append(
            _Chunk(begin + start, begin + end, begin, match.end(), core, begin + owner_end)
        )
    return chunks


_fold = lru_cache(20_000)(fold_text)


def _list_candidates(
    text: str, max_words: int, first_words: Set[str] | None = None
) -> Iterator[Mention]:
    """Yield all runs of words that could be a name, or those that begin with `first_words`."""
    chunks = _split_chunks(text)
    for first, opening in enumerate(chunks):
        if first_words is not None and first_words.isdisjoint(
            _fold(text[start:end])
            for start in {opening.start, opening.full_start}
            for end in {opening.owner_end, opening.end, opening.full_end}
        ):
            continue
        folded = ""
        for chunk in chunks[first : first + max_words]:
            head, start = folded, chunks[first].start
            if not head and chunk.owner_end < chunk.start:
                continue
            for end in dict.fromkeys((chunk.owner_end, chunk.end, chunk.full_end)):
                begin = chunk.start if head else start
                name = _fold(text[begin:end])
                if name:
                    yield Mention(start, end, f"{head} {name}" if head else name)
            if not head and chunk.full_start < chunk.start:
                yield Mention(
                    chunk.full_start, chunk.full_end, _fold(text[chunk.full_start : chunk.full_end])
                )
            folded_chunk = _fold(
                text[chunk.start if not head else chunk.full_start : chunk.full_end]
            )
            folded = f"{head} {folded_chunk}" if head else folded_chunk
    for run in re.finditer(f"(?:{UNSPACED.pattern})+", text):
        for start in range(run.start(), run.end()):
            for end in range(start + 1, min(run.end(), start + MAX_UNSPACED_NAME) + 1):
                yield Mention(start, end, _fold(text[start:end]))


def list_candidate_names(text: str, max_words: int) -> set[str]:
    """Return the folded names that could be mentioned in `text`.

    Args:
        text: any text.
        max_words: words of the longest name.
    """
    return {mention.name for mention in _list_candidates(text, max_words)}


def find_mentions(text: str, names: Collection[str], max_words: int) -> list[Mention]:
    """Find the mentions of names, in their order; the longest of several at one place.

    A word beside a name that looks like a part of it makes another name: "Mary Ann Vance" does not
    mention Ann Vance.

    Args:
        text: any text.
        names: folded.
        max_words: words of the longest name.
    """
    if not names:
        return []
    first_words = {name.split()[0] for name in names if name}
    candidates = [
        mention
        for mention in _list_candidates(text, max_words, first_words)
        if mention.name in names
    ]
    candidates.sort(key=lambda mention: (mention.start - mention.end, mention.start))
    mentions: list[Mention] = []
    for mention in candidates:
        overlaps = any(
            mention.start < other.end and other.start < mention.end for other in mentions
        )
        if not overlaps:
            mentions.append(mention)
    mentions.sort(key=lambda mention: mention.start)
    return [mention for mention in mentions if not _is_part_of_longer_name(text, mention)]


def _is_part_of_longer_name(text: str, mention: Mention) -> bool:
    """Check whether the words around a mention make it another name, or a common word."""
    spelled = text[mention.start : mention.end]
    if " " not in mention.name and mention.name in COMMON_WORDS and spelled.islower():
        return True
    if UNSPACED.match(spelled):
        return _is_part_of_word(text, mention)
    has_case = spelled.lower() != spelled.upper()
    if (has_case and not begins_with_capital(spelled)) or is_all_capitals(
        text[max(0, mention.start - AROUND) : mention.start + AROUND]
    ):
        return False
    after = re.match(r"(?:[-‐‑]|[ \n])(\w[\w’'-]*)", text[mention.end :])
    is_name = (
        after and after[1][0].isupper() and after[1].lower() not in SENTENCE_STARTERS | NON_NAMES
    )
    if after and is_name and _is_emphasized(after[1]) <= _is_emphasized(spelled):
        return True
    before = re.search(r"(\S+)[ \n]+$", text[: mention.start])
    if before is None or not begins_with_capital(before[1]) or not before[1][-1:].isalnum():
        return False
    word = before[1].lower()
    if _is_emphasized(before[1]) and not _is_emphasized(spelled):
        return False
    return word not in SENTENCE_STARTERS | NON_NAMES | TITLES and not _ends_as_no_name(word)


def _is_part_of_word(text: str, mention: Mention) -> bool:
    """Check whether a name without spaces is a part of a word in a text with spaces."""
    around = text[max(0, mention.start - AROUND) : mention.end + AROUND]
    unspaced = len(UNSPACED.findall(around))
    if 2 * unspaced > sum(letter.isalpha() for letter in around):
        return False  # a text in that script, where words are not told apart
    neighbors = text[mention.start - 1 : mention.start] + text[mention.end : mention.end + 1]
    return UNSPACED.search(neighbors) is not None


def _is_emphasized(word: str) -> bool:
    """Check whether a word is in capital letters throughout, and no number as in "Henry VIII"."""
    return len(word) > 1 and word.isupper() and not re.fullmatch("[IVXL]+", word)


def begins_with_capital(word: str) -> bool:
    """Check whether a word is written like a name; "d'Aubigny" and "al-Hassan" are, too."""
    return word[:1].isupper() or re.match(r"[a-z]{1,3}['’-][A-Z]", word) is not None


def is_all_capitals(text: str) -> bool:
    """Check whether a text is in capital letters, which then mark no name."""
    letters = [letter for letter in text if letter.isalpha()]
    lower = sum(letter.islower() for letter in letters)
    return bool(letters) and lower <= 0.1 * len(letters)


def _is_common_word(text: str, chunk: _Chunk, mentions: Collection[Mention]) -> bool:
    """Check whether the first word of a sentence is no name by its ending or what follows it.

    As in "Mostly Brazil exports", "Working for Ada", "Farmers in Brazil grow" and "Capital of
    Brazil:".
    """
    word = chunk.text.lower()
    if _ends_as_no_name(word):
        return True
    following = GOVERNED.match(text, chunk.full_end)
    if following is None:
        return False
    starts = (following.start(2), following.end())  # before and after the article
    if not any(mention.start in starts for mention in mentions):
        return False
    is_plural = re.search(r"[^su]s$", word) and word not in NAMES_LIKE_WORDS
    return following[1] == "of" or bool(is_plural)


def _ends_as_no_name(word: str) -> bool:
    """Check whether a word in lower case ends as an adverb or a participle does."""
    return word.endswith(("ly", "ing")) and word not in NAMES_LIKE_WORDS


def find_names(text: str, mentions: Collection[Mention] = ()) -> list[Mention]:
    """Find mentions, and everything else that looks like a name, in their order.

    A name begins with a capital letter. In a script without them it is a name where most of the
    text is in a script that has them.

    Args:
        text: one sentence, or several.
        mentions: of stored subjects, which are names in any case.
    """
    names = list(mentions)
    if is_all_capitals(text[-2 * AROUND :]):
        return sorted(names, key=lambda name: name.start)
    current: list[_Chunk] = []

    def close() -> None:
        if current:
            start, end = current[0].start, current[-1].owner_end
            if not any(start < mention.end and mention.start < end for mention in mentions):
                names.append(Mention(start, end))
            current.clear()

    num_letters = sum(letter.isalpha() for letter in text)
    num_cased = sum(letter.lower() != letter.upper() for letter in text)
    has_case = 2 * num_cased > num_letters
    is_start = True
    for chunk in _split_chunks(text):
        word = chunk.text.lower()
        is_foreign = has_case and word == chunk.text.upper() and any(map(str.isalpha, word))
        is_capital = is_foreign or (begins_with_capital(chunk.text) and word not in NON_NAMES)
        is_capital = is_capital and not _is_emphasized(chunk.text)
        bare = re.split(r"['’]", word)[0]
        if is_start and (bare in SENTENCE_STARTERS or _is_common_word(text, chunk, mentions)):
            is_capital = False
        if chunk.full_start < chunk.start:  # a quote or bracket
            close()
        if is_capital:
            current.append(chunk)
        else:
            close()
        punctuation = text[chunk.end : chunk.full_end]
        if punctuation or chunk.owner_end < chunk.end:
            close()
        is_start = bool(re.search(r"[.!?:…\"“]", punctuation)) and word not in TITLES
    close()
    return sorted(names, key=lambda name: name.start)
