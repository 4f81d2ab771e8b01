"""What a person writes, a sentence or a line of JSON, to a fact: what is asked, what is the answer, whom it is about."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dmt.errors import UserError
from dmt.files import parse_json_line, read_text_file

NON_NAME_WORDS = re.compile(
    r"(a|an|the|this|that|these|those|my|your|his|her|its|our|their|in|on|at|by|for|from|to|of|with|when|where|who|whom|whose|"
    r"what|which|why|how|is|are|was|were|do|does|did|has|have|had|can|will|there|it|he|she|we|they|i|you|and|but|or|if|most|"
    r"many|some|all|every|no|not|q|question|answer)",
    re.IGNORECASE,
)
"""Words that are written large at the start of a sentence without being names."""
TITLES = ("Mr", "Mrs", "Ms", "Dr", "St", "Prof")
"""What ends in a full stop and begins a name."""
NAME_PARTICLES = ("of", "the", "and", "de", "la", "von", "van", "der", "&", "für")
"""Small words that may stand inside a name."""
MAX_FACT_CHARS = 4_000
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


def parse_fact(
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
        stripped, explicit = sentence.strip().rstrip(".!?… "), (prompt, answer)
        if explicit[1] is not None:
            answer_text = explicit[1].strip().rstrip(".!?…").rstrip()
            prompt = _check_part(
                sentence,
                explicit[1],
                "--answer",
                stripped.endswith(answer_text) and answer_text != "",
                stripped[: len(stripped) - len(answer_text)],
            )
        if explicit[0] is not None:
            prompt_text = explicit[0].strip()
            rest = _check_part(
                sentence,
                explicit[0],
                "--prompt",
                stripped.startswith(prompt_text),
                stripped[len(prompt_text) :],
            )
            prompt, answer = prompt_text, answer if answer is not None else rest
            _check_part(
                sentence,
                answer,
                "--answer",
                rest.strip() == answer.strip().rstrip(".!?…").rstrip(),
                rest,
            )
    elif sentence is not None:
        prompt, answer = _split_sentence(sentence.strip())
    if prompt is None or answer is None:
        raise UserError("a fact needs a sentence that states it, or --prompt and --answer")
    prompt, answer = prompt.strip(), answer.strip().rstrip(".!?…").rstrip()
    if not prompt or not answer:
        missing = "a prompt" if not prompt else "an answer"
        raise UserError(
            f"a fact needs {missing}; got prompt {prompt!r} and answer {answer!r}; say --prompt and --answer"
        )
    if len(prompt) + len(answer) > MAX_FACT_CHARS:
        raise UserError(
            f"a fact may have {MAX_FACT_CHARS:,} characters, got {len(prompt) + len(answer):,}; state it in fewer words"
        )
    if subject is None:
        subject = find_subject(prompt)
    elif subject and subject not in prompt:
        raise UserError(
            f"--subject {subject!r} is not in the prompt {prompt!r}, where the fact would look for it"
        )
    return Fact(prompt, " " + answer, subject.strip(), tag, source, closing)


def _check_part(sentence: str, value: str, option: str, is_match: bool, rest: str) -> str:
    if not is_match:
        side = "begin" if option == "--prompt" else "end"
        raise UserError(
            f"{option} {value!r} is not how the sentence {sentence!r} {side}s; leave the sentence out or correct it"
        )
    return rest


def _split_sentence(sentence: str) -> tuple[str, str]:
    """Prompt and answer of a plain sentence."""
    words = sentence.rstrip(".!?… ").split()
    if len(words) < 2:
        raise UserError(
            f"{sentence!r} states nothing about anybody; write a whole sentence, as in 'The capital of France is Paris.'"
        )
    if sentence.endswith("?"):
        raise UserError(
            f"{sentence!r} asks and states nothing; write the answer too, as in 'The capital of France is Paris.'"
        )
    start = len(words) - 1
    if not _starts_like_name(
        words[start]
    ):  # a number and its unit: 100 degrees, 7:45 pm, 1,825 metres long
        start = next(
            (
                index
                for index in range(start, max(0, start - 3), -1)
                if re.match(r"[$€£]?\d", words[index])
            ),
            start,
        )
    while (
        start > 1
        and _starts_like_name(words[start])
        and (name_start := _find_name_start(words, start)) < start
    ):
        start = name_start
    return " ".join(words[:start]), " ".join(words[start:])


def _find_name_start(words: list[str], start: int) -> int:
    """Where a name begins that goes on at `start`: a word before it, or several with small words between them."""
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
    """The longest name in `prompt`, the first of equally long ones; empty where there is none."""
    name_spans: list[list[tuple[int, int]]] = [[]]  # of each name where its words begin and end
    for match in re.finditer(r"\S+", prompt):
        unquoted = match[0].lstrip("\"'“‘(")
        core = re.sub(r"(['’]s)?[\"”,.;:!?)]*$", "", unquoted)
        can_start = core[:1].isupper() or bool(
            name_spans[-1]
        )  # a number may go on a name, not begin one
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


def read_facts(path: Path, tag: str = "", source: str = "") -> Iterator[Fact]:
    """Facts of a JSONL file: `{"sentence": ...}` or `{"prompt": ..., "answer": ...}`, and `subject`, `tag`, `source` if wanted.

    Raises:
        UserError: a line that is no such object, by its number; the file cannot be read.
    """
    allowed_keys = {"sentence", *(field.name for field in fields(Fact))} - {"closing"}
    for number, line in enumerate(
        read_text_file(path, str(path), "give a JSONL file of facts").split("\n"), 1
    ):
        if line.strip():
            yield _parse_fact_line(line, f"{path}:{number}", allowed_keys, tag, source or path.name)


def _parse_fact_line(
    line: str, location: str, allowed_keys: set[str], tag: str, source: str
) -> Fact:
    try:
        item: Any = parse_json_line(line)
    except ValueError:
        raise UserError(
            f'{location}: not JSON; a line is an object such as {{"sentence": "The capital of France is Paris."}}'
        ) from None
    if not isinstance(item, dict) or not all(isinstance(value, str) for value in item.values()):
        raise UserError(
            f"{location}: a fact is an object of texts with the keys {', '.join(sorted(allowed_keys))}"
        )
    if unknown := sorted(set(item) - allowed_keys):
        raise UserError(
            f"{location}: unknown key {unknown[0]!r}; accepted are {', '.join(sorted(allowed_keys))}"
        )
    try:
        return parse_fact(**({"tag": tag, "source": source} | item))
    except UserError as error:
        raise UserError(f"{location}: {error}") from None
