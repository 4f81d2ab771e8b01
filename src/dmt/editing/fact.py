"""Facts as people write them: sentences or JSONL, split into prompt, answer and subject."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmt.errors import UserError
from dmt.files import read_json_lines
from dmt.store.records import FactRecord
from dmt.text import (
    SENTENCE_ENDS,
    UNSPACED,
    USER_SUBJECT,
    fold_text,
    is_first_person,
    join_with_space,
    mentions_user,
)

# Words that are capitalized at the start of a sentence without being names.
NON_NAME_WORDS = re.compile(
    r"(a|an|the|this|that|these|those|my|your|his|her|its|our|their|in|on|at|by|for|from|to|of|with|"
    r"when|where|who|whom|whose|what|which|why|how|is|are|was|were|do|does|did|has|have|had|can|"
    r"will|there|it|he|she|we|they|i|you|and|but|or|if|most|many|some|all|every|no|not|q|question|"
    r"answer|after|before|since|during|until|while|as|because|although|though|near|between|both|"
    r"each|any|then|so)",
    re.IGNORECASE,
)
TITLES = (  # end in a full stop and begin a name
    *("Mr", "Mrs", "Ms", "Dr", "St", "Prof", "Mt", "Gen", "Col", "Capt", "Lt", "Sgt", "Rev"),
    *("Sen", "Gov"),
)
NAME_PARTICLES = (  # within a name
    *("of", "the", "and", "de", "la", "von", "van", "der", "&", "für", "da", "del", "della", "di"),
    *("dos", "du", "den", "des", "el", "al", "bin", "ibn", "le", "ter", "zu"),
)
NAME_PREFIX_PATTERN = re.compile(r"[^\W\d_]{1,3}['’-]")  # d'Arc, al-Razi
MONTHS = (
    "(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|"
    "Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)"
)
DAY = r"\d{1,2}(?:st|nd|rd|th)?"
# A date that is no part of a name: 3 March 1911, March 3rd, in May.
DATE_PATTERN = re.compile(
    rf"\b(?:{DAY}(?: of)? {MONTHS}\b\.?(?:,? \d{{3,4}}\b)?|"
    rf"{MONTHS}\.? (?:\d{{3,4}}|{DAY}(?:,? \d{{3,4}})?)\b|"
    rf"(?<=\b[Ii]n ){MONTHS}\b)"
)
# Words that end in a full stop without ending a sentence: titles, initials, the day in "3. Mai".
ABBREVIATION_PATTERN = re.compile(
    rf"(?:{'|'.join(TITLES)}|{MONTHS}|No|Co|Ft|[^\W\d_](?:\.[^\W\d_])*|\d{{1,2}})\."
)
NUMBER_PATTERN = re.compile(r"[^\w\s]{0,2}\d")  # 42, $3.5, -40, (5
# Units of a number that another number may follow, as in 5 ft 11 in.
COMPOUND_UNITS = re.compile(
    "(?:h|hours?|min|minutes?|days?|weeks?|months?|years?|ft|foot|feet|m|met(?:er|re)s?|km|kg|"
    "lbs?|pounds?|st|stone)"
)
SCALES = ("thousand", "million", "billion", "trillion")  # part of a number
ERAS = ("BC", "AD", "BCE", "CE")  # follow a number
# Quotation marks by the one that closes them.
OPENING_QUOTES = {'"': '"', "'": "'", "”": "“„", "’": "‘", "“": "„", "»": "«", "«": "»"}
# "I" and "we" where they are what a statement or question is about, not titles or numerals.
NOMINATIVE_PATTERN = re.compile(
    r"\b(?:I|i|[Ww]e)(?:['’](?:m|re|ve|d|ll))?\b(?!,|['’.])(?!\s+[A-Z])"
)
POSSESSIVE_PATTERN = re.compile(r"(?:My|my|Our|our|Mine|Ours|Me|Myself)\b(?!,)(?!\s+[A-Z])")
# A person or thing of the user's that has a name: my sister Ada, my best friend Ada.
NAMED_POSSESSION_PATTERN = re.compile(
    r"(?:My|my|Our|our)\s+(?:(?:best|good|close|dear|old|new|late|own|big|little|twin|first|"
    r"second|former|(?:young|old|eld)(?:er|est))\s+)?[a-z-]+,?\s+[A-Z]"
)
# Where nobody speaks of himself: a quotation, a mine.
NOT_SPOKEN_PATTERN = re.compile(r"[\"“„«][^\"“”„«»]*[\"“”«»]|\b(?!of )\w+ mine\b")
# Of a fact in JSON.
FACT_KEYS = ("add", "answer", "closing", "prompt", "sentence", "source", "subject", "tag")
FACT_EXAMPLE = '{"sentence": "The capital of France is Paris."}'
CLOSING_MARKS = tuple(".!。！．｡")  # one of them ends a statement
MAX_FACT_CHARS = 4_000  # of prompt and answer together


@dataclass(frozen=True)
class Fact:
    """A fact to write.

    Attributes:
        prompt: the text up to the answer.
        answer: the text that follows, with the space before it where there is one.
        subject: the entity that it is about, as the prompt spells it; empty where there is none.
        tag: label to filter by.
        source: where it comes from.
        closing: the full stop that ends the answer, where one was written; it keeps the model from
            continuing the last word.
        add: add the answer to that of the stored fact with the same question, as one more value of
            a list, instead of replacing it.
    """

    prompt: str
    answer: str
    subject: str = ""
    tag: str = ""
    source: str = ""
    closing: str = ""
    add: bool = False


def parse_fact(
    sentence: str | None = None,
    prompt: str | None = None,
    answer: str | None = None,
    subject: str | None = None,
    tag: str = "",
    source: str = "",
    closing: str | None = None,
    add: bool = False,
) -> Fact:
    """Make a fact from a sentence that states it, or from its parts.

    The answer is what the sentence ends with: a quotation, a name, a date, a number with its unit,
    else the last word. The subject is the longest name before it, or `USER_SUBJECT` in the first
    person.

    Args:
        sentence: as in "The capital of France is Paris."
        prompt: the text up to the answer; the start of the sentence, where that is given too.
        answer: the text after the prompt; the end of the sentence, where that is given too.
        subject: part of the prompt, or `USER_SUBJECT`; empty for none; detected where it is None.
        tag: label to filter by.
        source: where the fact comes from.
        closing: the marks after the answer; where it is passed, prompt and answer are taken to the
            letter, and the answer begins with its space.
        add: add the answer to that of a stored fact, see `Fact`.

    Raises:
        UserError: the sentence states nothing, a part is missing, or the parts contradict each
            other.
    """
    if closing is not None:
        _check_closing(closing, sentence)
    elif sentence is not None:
        prompt, answer, closing = _parse_sentence(sentence, prompt, answer)
    elif prompt is not None and answer is not None:
        prompt, answer, closing = _parse_parts(prompt, answer)
    if prompt is None or answer is None or closing is None:
        raise UserError("a fact needs a sentence that states it, or prompt and answer")
    if not prompt.strip() or not answer.strip():
        missing = "a prompt" if not prompt.strip() else "an answer"
        raise UserError(
            f"a fact needs {missing}; got prompt {prompt.strip()!r} and answer "
            f"{answer.strip()!r}; give both"
        )
    num_chars = len(prompt) + len(answer.strip())
    if num_chars > MAX_FACT_CHARS:
        raise UserError(
            f"a fact may have {MAX_FACT_CHARS:,} characters, got {num_chars:,}; state it in fewer "
            "words"
        )
    subject = find_subject(prompt) if subject is None else _check_subject(subject.strip(), prompt)
    return Fact(prompt, answer, subject, tag, source, closing, add)


def _check_closing(closing: str, sentence: str | None) -> None:
    """Raise `UserError` for a closing that is not of a fact in parts, or not made of marks."""
    if sentence is not None or closing.strip(SENTENCE_ENDS):
        raise UserError(
            f"closing {closing!r} is for a fact of prompt and answer, and may hold the marks "
            f"{SENTENCE_ENDS}; leave it out"
        )


def _check_subject(subject: str, prompt: str) -> str:
    """Return a subject that is named in the prompt, `USER_SUBJECT` for all names of the user's."""
    if fold_text(subject) == USER_SUBJECT or is_first_person(subject):
        subject, is_named = USER_SUBJECT, mentions_user(prompt)
    else:
        is_named = fold_text(subject) in fold_text(prompt)
    if not is_named:
        raise UserError(
            f"subject {subject!r} is not in the prompt {prompt!r}, where the fact would look for it"
        )
    return subject


def _parse_sentence(sentence: str, prompt: str | None, answer: str | None) -> tuple[str, str, str]:
    """Split a sentence into prompt, answer and closing, where parts are passed at those."""
    if prompt is None and answer is None:
        prompt, answer = _split_sentence(sentence.strip())
        space = " "
    else:
        prompt, answer = _split_at_part(sentence, prompt, answer)
        space = " " if prompt[-1:].isspace() or answer[:1].isspace() else ""
    closing = "".join(mark for mark in sentence.rstrip()[-1:] if mark in CLOSING_MARKS)
    return prompt.strip(), space + _strip_end(answer), closing


def _parse_parts(prompt: str, answer: str) -> tuple[str, str, str]:
    """Return prompt, answer and closing of a fact whose parts are passed apart.

    Spaces between them become one, a line break stays. One mark may close the answer; others are
    part of it.
    """
    text = answer.strip()
    gap = prompt[len(prompt.rstrip()) :] + answer[: len(answer) - len(answer.lstrip())]
    if gap and not gap.strip(" "):
        gap = " "
    is_closed = text[-1:] in CLOSING_MARKS and text[-2:-1] not in tuple(SENTENCE_ENDS)
    closing = text[-1:] if is_closed else ""
    text = text.removesuffix(closing)
    return prompt.strip(), (gap or join_with_space(prompt, answer)) + text, closing


def _strip_end(text: str) -> str:
    """Strip spaces and the marks that end a sentence."""
    return text.strip().rstrip(SENTENCE_ENDS).rstrip()


def _split_at_part(sentence: str, prompt: str | None, answer: str | None) -> tuple[str, str]:
    """Split a sentence at the given prompt, answer or both."""
    stripped = sentence.strip().rstrip(SENTENCE_ENDS + " ")
    if answer is not None and not (_strip_end(answer) and stripped.endswith(_strip_end(answer))):
        raise _mismatch("answer", answer, sentence)
    if prompt is None:
        assert answer is not None, "one part is given"
        return stripped[: len(stripped) - len(_strip_end(answer))], answer
    if not stripped.startswith(prompt.strip()):
        raise _mismatch("prompt", prompt, sentence)
    rest = stripped[len(prompt.strip()) :]
    if answer is not None and rest.strip() != _strip_end(answer):
        raise _mismatch("answer", answer, sentence)
    return prompt.strip(), rest


def _mismatch(name: str, value: str, sentence: str) -> UserError:
    side = "begins" if name == "prompt" else "ends"
    return UserError(
        f"{name} {value!r} is not how the sentence {sentence!r} {side}; leave the sentence out or "
        "correct it"
    )


def _split_sentence(sentence: str) -> tuple[str, str]:
    """Split a plain sentence into prompt and answer."""
    words = sentence.rstrip(SENTENCE_ENDS + " ").split()
    if len(words) == 1 and UNSPACED.search(sentence):
        raise UserError(
            f"{sentence!r} has no spaces that separate its words, so that it cannot be split; give "
            "prompt or answer too"
        )
    if len(words) < 2:
        raise UserError(
            f"{sentence!r} states nothing; write a whole sentence, as in 'The capital of France is "
            "Paris.'"
        )
    if sentence.endswith(("?", "？")):
        raise UserError(
            f"{sentence!r} asks and states nothing; write the answer too, as in 'The capital of "
            "France is Paris.'"
        )
    start = _find_quotation(words) or _find_measure(words)
    if start is None:
        start = len(words) - 1
    while start > 1 and _starts_like_name(words[start]):
        name_start = _find_name_start(words, start)
        if name_start == start:
            break
        start = name_start
    return " ".join(words[:start]), " ".join(words[start:])


def _find_quotation(words: list[str]) -> int | None:
    """Return where the quotation starts that ends a sentence; None where none does."""
    for start in range(len(words) - 1, 0, -1):
        if words[start][0] in OPENING_QUOTES.get(words[-1][-1], ""):
            return start
    return None


def _find_measure(words: list[str]) -> int | None:
    """Return where a number with words after it starts that ends a sentence; None without one.

    So do 100 degrees, 7:45 pm, 1,825 meters long, $3.5 million, 5 ft 11 in and 300 BC.
    """
    if _starts_like_name(words[-1]) and words[-1] not in ERAS:
        return None
    start, num_words = len(words) - 1, 0
    while start > 0 and not NUMBER_PATTERN.match(words[start]):
        num_words += words[start] not in SCALES
        if num_words == 3:
            return None
        start -= 1
    if start == 0:
        return None
    while True:
        before, unit = words[max(0, start - 2) : start] if start > 2 else ("", "")
        if NUMBER_PATTERN.match(unit):  # 3 1/2
            start -= 1
        elif NUMBER_PATTERN.match(before) and COMPOUND_UNITS.fullmatch(unit):
            start -= 2
        else:
            return start


def _find_name_start(words: list[str], start: int) -> int:
    """Extend a name that continues at `start` by one word, over particles between them."""
    previous = start - 1
    while previous > 0 and words[previous] in NAME_PARTICLES:
        previous -= 1
    is_name_part = (
        (_starts_like_name(words[previous]) or NUMBER_PATTERN.match(words[previous]))
        and not _ends_sentence(words[previous])
        and not NON_NAME_WORDS.fullmatch(words[previous])
    )
    return previous if previous > 0 and is_name_part else start


def _starts_like_name(word: str) -> bool:
    stripped = word.lstrip("\"'“‘(")
    core = NAME_PREFIX_PATTERN.sub("", stripped, count=1)
    return (
        stripped[:1].isupper()
        or stripped[:1].isdigit()
        or core[:1].isupper()
        or (stripped[:1].isalpha() and stripped[1:2].isupper())
    )


def _ends_sentence(word: str) -> bool:
    return word.endswith((".", "?", "!", ":", ";")) and not ABBREVIATION_PATTERN.fullmatch(word)


def find_subject(prompt: str) -> str:
    """Return whom or what a prompt is about.

    That is the longest name in it, the first of equally long ones; `USER_SUBJECT` where it speaks
    in the first person about the user and not about somebody with a name; else an empty text.
    """
    name = _find_longest_name(DATE_PATTERN.sub(lambda date: "-" * len(date[0]), prompt))
    if not mentions_user(NOT_SPOKEN_PATTERN.sub(" ", prompt)):
        return name or _find_longest_name(prompt)
    nominative = NOMINATIVE_PATTERN.search(prompt)
    is_about_user = (
        not name
        or (nominative is not None and nominative.start() < prompt.index(name))
        or (POSSESSIVE_PATTERN.match(prompt) and not NAMED_POSSESSION_PATTERN.match(prompt))
    )
    return USER_SUBJECT if is_about_user else name


def _find_longest_name(prompt: str) -> str:
    """Return the longest name in `prompt`, the first of equally long ones, or an empty text."""
    # Start and end of each word, by name.
    name_spans: list[list[tuple[int, int]]] = [[]]
    for match in re.finditer(r"\S+", prompt):
        unquoted = match[0].lstrip("\"'“‘(")
        core = re.sub(r"(['’]s)?[\"”,.;:!?)]*$", "", unquoted)
        # A number may continue a name, not begin one.
        can_start = not core[:1].isdigit() or bool(name_spans[-1])
        is_name = (
            _starts_like_name(unquoted)
            and core != ""
            and can_start
            and not NON_NAME_WORDS.fullmatch(core)
            and not is_first_person(core)
        )
        if not is_name or unquoted != match[0]:
            name_spans.append([])
        if is_name:
            start = match.end() - len(unquoted)
            name_spans[-1].append((start, start + len(core)))
            is_abbreviation = ABBREVIATION_PATTERN.fullmatch(f"{core}.") is not None
            name_spans += [[]] if core != unquoted and not is_abbreviation else []
    best = max(name_spans, key=len)
    return prompt[best[0][0] : best[-1][1]] if best else ""


def fact_from_record(record: FactRecord, closing: str) -> Fact:
    """Return the fact that a record was made of.

    Args:
        record: of the fact.
        closing: of the fact, see `dmt.text.find_closing`.
    """
    return Fact(record.prompt, record.answer, record.subject, record.tag, record.source, closing)


def fact_from_mapping(item: Mapping[str, Any]) -> Fact:
    """Make a fact from a mapping with arguments of `parse_fact`.

    Raises:
        UserError: a key is unknown, or the arguments make no fact.
    """
    if unknown := sorted(set(item) - set(FACT_KEYS)):
        raise UserError(f"unknown key {unknown[0]!r}; accepted are {', '.join(FACT_KEYS)}")
    return parse_fact(**item)


def read_facts(path: Path, tag: str = "", source: str = "") -> Iterator[Fact]:
    """Read the facts of a JSONL file.

    Args:
        path: a line is `{"sentence": ...}` or `{"prompt": ..., "answer": ...}`, with the other
            arguments of `parse_fact` where wanted.
        tag: of facts that have none.
        source: of facts that have none; the file's name where it is empty.

    Raises:
        UserError: a line is no such object, with its number, or the file cannot be read.
    """
    for location, item in read_json_lines(
        path, str(path), "give a JSONL file of facts", FACT_EXAMPLE
    ):
        if not all(
            isinstance(value, bool if name == "add" else str) for name, value in item.items()
        ):
            raise UserError(
                f"{location} is not a fact: an object of texts, true or false for add, with the "
                f"keys {', '.join(FACT_KEYS)}; a line is {FACT_EXAMPLE}"
            )
        try:
            yield fact_from_mapping({"tag": tag, "source": source or path.name} | item)
        except UserError as error:
            raise UserError(f"{location}: {error}") from None
