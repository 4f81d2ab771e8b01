"""Facts as people write them: sentences or JSONL, split into prompt, answer and subject."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dmt.errors import UserError
from dmt.files import read_json_lines
from dmt.text import SENTENCE_ENDS, UNSPACED, fold_text, join_with_space

# Words that are capitalized at the start of a sentence without being names.
NON_NAME_WORDS = re.compile(
    r"(a|an|the|this|that|these|those|my|your|his|her|its|our|their|in|on|at|by|for|from|to|of|with|"
    r"when|where|who|whom|whose|what|which|why|how|is|are|was|were|do|does|did|has|have|had|can|"
    r"will|there|it|he|she|we|they|i|you|and|but|or|if|most|many|some|all|every|no|not|q|question|"
    r"answer)",
    re.IGNORECASE,
)
TITLES = ("Mr", "Mrs", "Ms", "Dr", "St", "Prof")  # end in a full stop and begin a name
NAME_PARTICLES = ("of", "the", "and", "de", "la", "von", "van", "der", "&", "für")  # within a name
FACT_KEYS = ("answer", "prompt", "sentence", "source", "subject", "tag")  # of a fact in JSON
FACT_EXAMPLE = '{"sentence": "The capital of France is Paris."}'
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
    """

    prompt: str
    answer: str
    subject: str = ""
    tag: str = ""
    source: str = ""
    closing: str = ""


def parse_fact(
    sentence: str | None = None,
    prompt: str | None = None,
    answer: str | None = None,
    subject: str | None = None,
    tag: str = "",
    source: str = "",
) -> Fact:
    """Make a fact from a sentence that states it, or from its parts.

    The answer is the last name, number or date of the sentence, else its last word. The subject is
    the longest name before it.

    Args:
        sentence: as in "The capital of France is Paris."
        prompt: the text up to the answer; the start of the sentence, where that is given too.
        answer: the text after the prompt; the end of the sentence, where that is given too.
        subject: part of the prompt; empty for none; detected where it is None.
        tag: label to filter by.
        source: where the fact comes from.

    Raises:
        UserError: the sentence states nothing, a part is missing, or the parts contradict each
            other.
    """
    ending = (answer if sentence is None else sentence) or ""
    closing = "".join(mark for mark in ending.rstrip()[-1:] if mark in ".!。！．｡")
    if sentence is not None and (prompt is not None or answer is not None):
        prompt, answer = _split_at_part(sentence, prompt, answer)
        space = " " if prompt[-1:].isspace() or answer[:1].isspace() else ""
    elif sentence is not None:
        prompt, answer = _split_sentence(sentence.strip())
        space = " "
    elif prompt is None or answer is None:
        raise UserError("a fact needs a sentence that states it, or prompt and answer")
    else:
        is_spaced = prompt[-1:].isspace() or answer[:1].isspace()
        space = " " if is_spaced else join_with_space(prompt, answer)
    prompt, answer = prompt.strip(), _strip_end(answer)
    if not prompt or not answer:
        missing = "a prompt" if not prompt else "an answer"
        raise UserError(
            f"a fact needs {missing}; got prompt {prompt!r} and answer {answer!r}; give both"
        )
    num_chars = len(prompt) + len(answer)
    if num_chars > MAX_FACT_CHARS:
        raise UserError(
            f"a fact may have {MAX_FACT_CHARS:,} characters, got {num_chars:,}; state it in fewer "
            "words"
        )
    if subject is None:
        subject = find_subject(prompt)
    elif fold_text(subject) not in fold_text(prompt):
        raise UserError(
            f"subject {subject!r} is not in the prompt {prompt!r}, where the fact would look for it"
        )
    return Fact(prompt, space + answer, subject.strip(), tag, source, closing)


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
    start = len(words) - 1
    if not _starts_like_name(words[start]):
        # A number and its unit: 100 degrees, 7:45 pm, 1,825 meters long.
        for index in range(start, max(0, start - 3), -1):
            if re.match(r"[$€£]?\d", words[index]):
                start = index
                break
    while start > 1 and _starts_like_name(words[start]):
        name_start = _find_name_start(words, start)
        if name_start == start:
            break
        start = name_start
    return " ".join(words[:start]), " ".join(words[start:])


def _find_name_start(words: list[str], start: int) -> int:
    """Extend a name that continues at `start` by one word, over particles between them."""
    previous = start - 1
    while previous > 0 and words[previous] in NAME_PARTICLES:
        previous -= 1
    ends_sentence = (
        words[previous].endswith((".", "?", "!", ":", ";"))
        and words[previous].rstrip(".") not in TITLES
    )
    is_name_part = (
        _starts_like_name(words[previous])
        and not ends_sentence
        and not NON_NAME_WORDS.fullmatch(words[previous])
    )
    return previous if previous > 0 and is_name_part else start


def _starts_like_name(word: str) -> bool:
    stripped = word.lstrip("\"'“‘(")
    return bool(stripped) and (stripped[0].isupper() or stripped[0].isdigit())


def find_subject(prompt: str) -> str:
    """Return the longest name in `prompt`, the first of equally long ones, or an empty text."""
    # Start and end of each word, by name.
    name_spans: list[list[tuple[int, int]]] = [[]]
    for match in re.finditer(r"\S+", prompt):
        unquoted = match[0].lstrip("\"'“‘(")
        core = re.sub(r"(['’]s)?[\"”,.;:!?)]*$", "", unquoted)
        # A number may continue a name, not begin one.
        can_start = core[:1].isupper() or bool(name_spans[-1])
        is_name = (
            _starts_like_name(unquoted)
            and core != ""
            and can_start
            and not NON_NAME_WORDS.fullmatch(core)
        )
        if not is_name or unquoted != match[0]:
            name_spans.append([])
        if is_name:
            start = match.end() - len(unquoted)
            name_spans[-1].append((start, start + len(core)))
            name_spans += [[]] if core != unquoted and core not in TITLES else []
    best = max(name_spans, key=len)
    return prompt[best[0][0] : best[-1][1]] if best else ""


def fact_from_mapping(item: Mapping[str, str]) -> Fact:
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
        path: a line is `{"sentence": ...}` or `{"prompt": ..., "answer": ...}`, with `subject`,
            `tag` and `source` where wanted.
        tag: of facts that have none.
        source: of facts that have none; the file's name where it is empty.

    Raises:
        UserError: a line is no such object, with its number, or the file cannot be read.
    """
    for location, item in read_json_lines(
        path, str(path), "give a JSONL file of facts", FACT_EXAMPLE
    ):
        if not all(isinstance(value, str) for value in item.values()):
            raise UserError(
                f"{location} is not a fact: an object of texts with the keys "
                f"{', '.join(FACT_KEYS)}; a line is {FACT_EXAMPLE}"
            )
        try:
            yield fact_from_mapping({"tag": tag, "source": source or path.name} | item)
        except UserError as error:
            raise UserError(f"{location}: {error}") from None
