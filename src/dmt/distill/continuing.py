"""How teacher and student go on from the same prompts, with what the one says and the other does not."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from dmt.evaluate import continuations

PROMPT_TOKENS = 24
SAMPLE_TOKENS = 40
SAMPLES_PER_CORPUS = 2

Piece = tuple[str, bool]
"""Some text, and whether the other model says something else in its place."""


@dataclass(frozen=True)
class Continuation:
    """One prompt and both greedy continuations.

    Attributes:
        teacher, student: what each says, in pieces that put together are its text.
        differing: tokens of the student's that the teacher does not say there.
        tokens: that each says.
    """

    prompt: str
    teacher: list[Piece]
    student: list[Piece]
    differing: int
    tokens: int


def continued(student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: Any, windows: Tensor) -> list[Continuation]:
    """Both models from the beginnings of some of the `windows` `(windows, time)` of token ids."""
    length = min(PROMPT_TOKENS, windows.shape[1] // 2)
    prompts = windows[:: max(1, len(windows) // SAMPLES_PER_CORPUS), :length][:SAMPLES_PER_CORPUS]
    room = min(SAMPLE_TOKENS, student.config.max_position_embeddings - length)
    theirs, mine = (continuations(model, prompts, room).tolist() for model in (teacher, student))
    found = []
    for prompt, said_by_teacher, said_by_student in zip(prompts.tolist(), theirs, mine, strict=True):
        other, own = apart(said_by_teacher, said_by_student)
        pieces = (_pieces(tokenizer, said_by_teacher, other), _pieces(tokenizer, said_by_student, own))
        found.append(Continuation(tokenizer.decode(prompt, skip_special_tokens=True), *pieces, sum(own), len(own)))
    return found


def apart(teacher: list[int], student: list[int]) -> tuple[list[bool], list[bool]]:
    """Of each token, whether it is the one side's alone: what both say in the same order is matched, even if shifted."""
    alone = [True] * len(teacher), [True] * len(student)
    for match in SequenceMatcher(None, teacher, student, autojunk=False).get_matching_blocks():
        alone[0][match.a : match.a + match.size] = [False] * match.size
        alone[1][match.b : match.b + match.size] = [False] * match.size
    return alone


def table(found: list[Continuation]) -> str:
    """A Markdown table of prompts and both continuations."""
    rows = ["| prompt | teacher | student |", "|---|---|---|"]
    for each in found:
        texts = (each.prompt, *("".join(text for text, _ in pieces) for pieces in (each.teacher, each.student)))
        rows.append("| " + " | ".join(text.replace("|", "/").replace("\n", " ").strip() for text in texts) + " |")
    return "\n".join(rows)


def _pieces(tokenizer: Any, ids: list[int], marks: list[bool]) -> list[Piece]:
    """The text of `ids`, cut where marks change: cut by length, as some tokenizers decode parts unlike the whole."""
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    pieces: list[Piece] = []
    begin = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or marks[end] != marks[end - 1]:
            reached = len(whole) if end == len(ids) else len(tokenizer.decode(ids[:end], skip_special_tokens=True))
            if reached > begin:
                pieces.append((whole[begin:reached], marks[end - 1]))
                begin = reached
    return pieces
