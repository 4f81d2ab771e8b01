"""Greedy continuations of teacher and student from the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from dmt.evaluation.metrics import generate_greedy

PROMPT_TOKENS = 24
SAMPLE_TOKENS = 40
SAMPLES_PER_CORPUS = 2

TextSpan = tuple[str, bool]  # some text, and whether only this model generates it here


@dataclass(frozen=True)
class SamplePair:
    """A prompt and the greedy continuations of teacher and student.

    Attributes:
        prompt: the prompt.
        teacher, student: the continuations as spans; joined they are the text.
        differing: number of the student's tokens that the teacher does not generate there.
        tokens: number of generated tokens.
    """

    prompt: str
    teacher: list[TextSpan]
    student: list[TextSpan]
    differing: int
    tokens: int


def paired_samples(
    student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: Any, windows: Tensor
) -> list[SamplePair]:
    """Continue the first tokens of some windows with both models.

    Args:
        student: the distilled model.
        teacher: the original model.
        tokenizer: the tokenizer of both.
        windows: token ids `(windows, time)`.
    """
    prompt_tokens = min(PROMPT_TOKENS, windows.shape[1] // 2)
    prompts = windows[:: max(1, len(windows) // SAMPLES_PER_CORPUS), :prompt_tokens][
        :SAMPLES_PER_CORPUS
    ]
    max_new_tokens = min(SAMPLE_TOKENS, student.config.max_position_embeddings - prompt_tokens)
    teacher_outputs, student_outputs = (
        generate_greedy(model, prompts, max_new_tokens).tolist() for model in (teacher, student)
    )
    samples = []
    for prompt, teacher_tokens, student_tokens in zip(
        prompts.tolist(), teacher_outputs, student_outputs, strict=True
    ):
        teacher_only, student_only = diff_tokens(teacher_tokens, student_tokens)
        spans = (
            _split_spans(tokenizer, teacher_tokens, teacher_only),
            _split_spans(tokenizer, student_tokens, student_only),
        )
        samples.append(
            SamplePair(
                tokenizer.decode(prompt, skip_special_tokens=True),
                *spans,
                sum(student_only),
                len(student_only),
            )
        )
    return samples


def diff_tokens(teacher: list[int], student: list[int]) -> tuple[list[bool], list[bool]]:
    """Return for each token of both sequences whether it is missing from the other.

    Tokens that both have in the same order match, even if shifted.
    """
    unmatched = [True] * len(teacher), [True] * len(student)
    for match in SequenceMatcher(None, teacher, student, autojunk=False).get_matching_blocks():
        unmatched[0][match.a : match.a + match.size] = [False] * match.size
        unmatched[1][match.b : match.b + match.size] = [False] * match.size
    return unmatched


def format_samples_table(samples: Sequence[SamplePair]) -> str:
    """Return a Markdown table of prompts and both continuations."""
    rows = ["| prompt | teacher | student |", "|---|---|---|"]
    for sample in samples:
        texts = (
            sample.prompt,
            *("".join(text for text, _ in spans) for spans in (sample.teacher, sample.student)),
        )
        rows.append(
            "| "
            + " | ".join(text.replace("|", "/").replace("\n", " ").strip() for text in texts)
            + " |"
        )
    return "\n".join(rows)


def _split_spans(tokenizer: Any, ids: list[int], differs: list[bool]) -> list[TextSpan]:
    """Return the text of `ids`, split where `differs` changes.

    The complete text is split by length, as some tokenizers decode a part differently alone.
    """
    text = tokenizer.decode(ids, skip_special_tokens=True)
    spans: list[TextSpan] = []
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or differs[end] != differs[end - 1]:
            stop = (
                len(text)
                if end == len(ids)
                else len(tokenizer.decode(ids[:end], skip_special_tokens=True))
            )
            if stop > start:
                spans.append((text[start:stop], differs[end - 1]))
                start = stop
    return spans
