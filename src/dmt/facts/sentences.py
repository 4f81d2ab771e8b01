"""What a person writes, a sentence or a line of JSON, to a fact: what is asked, what is the answer, whom it is about."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dmt.errors import UserError
from dmt.texts import json_of, text_of

OPENERS = re.compile(
    r"(a|an|the|this|that|these|those|my|your|his|her|its|our|their|in|on|at|by|for|from|to|of|with|when|where|who|whom|whose|"
    r"what|which|why|how|is|are|was|were|do|does|did|has|have|had|can|will|there|it|he|she|we|they|i|you|and|but|or|if|most|"
    r"many|some|all|every|no|not|q|question|answer)",
    re.IGNORECASE,
)
"""Words that are written large at the start of a sentence without being names."""
TITLES = ("Mr", "Mrs", "Ms", "Dr", "St", "Prof")
"""What ends in a full stop and begins a name."""
INSIDE = ("of", "the", "and", "de", "la", "von", "van", "der", "&", "für")
"""Small words that may stand inside a name."""
LONGEST = 4_000
"""Characters of a sentence."""


@dataclass(frozen=True)
class Fact:
    """What is to be known.

    Attributes:
        prompt: the text up to the answer.
        answer: what follows it, with the space before it where there is one.
        subject: whom or what it is about, as it is written in the prompt; empty where the prompt names nobody.
        tag: what it is filed under.
        source: where it comes from.
        closing: the full stop that ends the answer, where one was written, so that no longer word is made of it.
    """

    prompt: str
    answer: str
    subject: str = ""
    tag: str = ""
    source: str = ""
    closing: str = ""


def fact_of(
    sentence: str | None = None,
    prompt: str | None = None,
    answer: str | None = None,
    subject: str | None = None,
    tag: str = "",
    source: str = "",
) -> Fact:
    """A fact from a sentence that states it, or from its parts, of which those that are not given are found.

    The answer is the last name, number or date of the sentence, else its last word; the subject is the longest name
    before it.

    Raises:
        UserError: nothing is left to ask, or the parts contradict each other.
    """
    ending = (answer if sentence is None else sentence) or ""
    closing = "".join(mark for mark in ending.rstrip()[-1:] if mark in ".!")
    if sentence is not None and (prompt is not None or answer is not None):
        bare, parts = sentence.strip().rstrip(".!?… "), (prompt, answer)
        if parts[1] is not None:
            said = parts[1].strip().rstrip(".!?…").rstrip()
            prompt = _rest(sentence, parts[1], "--answer", bare.endswith(said) and said != "", bare[: len(bare) - len(said)])
        if parts[0] is not None:
            asked = parts[0].strip()
            rest = _rest(sentence, parts[0], "--prompt", bare.startswith(asked), bare[len(asked) :])
            prompt, answer = asked, answer if answer is not None else rest
            _rest(sentence, answer, "--answer", rest.strip() == answer.strip().rstrip(".!?…").rstrip(), rest)
    elif sentence is not None:
        prompt, answer = _split(sentence.strip())
    if prompt is None or answer is None:
        raise UserError("a fact needs a sentence that states it, or --prompt and --answer")
    prompt, answer = prompt.strip(), answer.strip().rstrip(".!?…").rstrip()
    if not prompt or not answer:
        what = "a prompt" if not prompt else "an answer"
        raise UserError(f"a fact needs {what}; got prompt {prompt!r} and answer {answer!r}; say --prompt and --answer")
    if len(prompt) + len(answer) > LONGEST:
        raise UserError(f"a fact may have {LONGEST:,} characters, got {len(prompt) + len(answer):,}; state it in fewer words")
    if subject is None:
        subject = subject_of(prompt)
    elif subject and subject not in prompt:
        raise UserError(f"--subject {subject!r} is not in the prompt {prompt!r}, where the fact would look for it")
    return Fact(prompt, " " + answer, subject.strip(), tag, source, closing)


def _rest(sentence: str, given: str, name: str, found: bool, rest: str) -> str:
    if not found:
        where = "begin" if name == "--prompt" else "end"
        raise UserError(f"{name} {given!r} is not how the sentence {sentence!r} {where}s; leave the sentence out or correct it")
    return rest


def _split(sentence: str) -> tuple[str, str]:
    """Prompt and answer of a plain sentence."""
    words = sentence.rstrip(".!?… ").split()
    if len(words) < 2:
        raise UserError(
            f"{sentence!r} states nothing about anybody; write a whole sentence, as in 'The capital of France is Paris.'"
        )
    if sentence.endswith("?"):
        raise UserError(f"{sentence!r} asks and states nothing; write the answer too, as in 'The capital of France is Paris.'")
    start = len(words) - 1
    if not _large(words[start]):  # a number and its unit: 100 degrees, 7:45 pm, 1,825 metres long
        start = next((at for at in range(start, max(0, start - 3), -1) if re.match(r"[$€£]?\d", words[at])), start)
    while start > 1 and _large(words[start]) and (earlier := _earlier(words, start)) < start:
        start = earlier
    return " ".join(words[:start]), " ".join(words[start:])


def _earlier(words: list[str], start: int) -> int:
    """Where a name begins that goes on at `start`: a word before it, or several with small words between them."""
    before = start - 1
    while before > 0 and words[before] in INSIDE:
        before -= 1
    ends = words[before].endswith((".", "?", "!", ":", ";")) and words[before].rstrip(".") not in TITLES
    part_of_name = _large(words[before]) and not ends and not OPENERS.fullmatch(words[before])
    return before if before > 0 and part_of_name else start


def _large(word: str) -> bool:
    bare = word.lstrip("\"'“‘(")
    return bool(bare) and (bare[0].isupper() or bare[0].isdigit())


def subject_of(prompt: str) -> str:
    """The longest name in `prompt`, the first of equally long ones; empty where there is none."""
    names: list[list[tuple[int, int]]] = [[]]  # of each name where its words begin and end
    for found in re.finditer(r"\S+", prompt):
        opened = found[0].lstrip("\"'“‘(")
        bare = re.sub(r"(['’]s)?[\"”,.;:!?)]*$", "", opened)
        begins = bare[:1].isupper() or bool(names[-1])  # a number may go on a name, not begin one
        named = _large(opened) and bare != "" and begins and not OPENERS.fullmatch(bare)
        if not named or opened != found[0]:
            names.append([])
        if named:
            first = found.end() - len(opened)
            names[-1].append((first, first + len(bare)))
            names += [[]] if bare != opened and bare not in TITLES else []
    best = max(names, key=len)
    return prompt[best[0][0] : best[-1][1]] if best else ""


def read_facts(path: Path, tag: str = "", source: str = "") -> Iterator[Fact]:
    """Facts of a JSONL file: `{"sentence": ...}` or `{"prompt": ..., "answer": ...}`, and `subject`, `tag`, `source` if wanted.

    Raises:
        UserError: a line that is no such object, by its number; the file cannot be read.
    """
    known = {"sentence", *(field.name for field in fields(Fact))} - {"closing"}
    for number, line in enumerate(text_of(path, str(path), "give a JSONL file of facts").split("\n"), 1):
        if line.strip():
            yield _of_line(line, f"{path}:{number}", known, tag, source or path.name)


def _of_line(line: str, place: str, known: set[str], tag: str, source: str) -> Fact:
    try:
        found: Any = json_of(line)
    except ValueError:
        raise UserError(
            f'{place}: not JSON; a line is an object such as {{"sentence": "The capital of France is Paris."}}'
        ) from None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise UserError(f"{place}: a fact is an object of texts with the keys {', '.join(sorted(known))}")
    if unknown := sorted(set(found) - known):
        raise UserError(f"{place}: unknown key {unknown[0]!r}; accepted are {', '.join(sorted(known))}")
    try:
        return fact_of(**({"tag": tag, "source": source} | found))
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
