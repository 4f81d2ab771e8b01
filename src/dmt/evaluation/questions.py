"""Questions with one correct answer each, and how probable a model finds it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmt.errors import UserError, format_value
from dmt.files import format_fields, read_json_lines
from dmt.models.forward import ForwardOutputs, batch_by_length, encode_text, pad_token_ids
from dmt.progress import ProgressLog

QUESTION_KEYS = ("prompt", "answer", "type")
QUESTION_EXAMPLE = (
    '{"prompt": "The capital of France is", "answer": " Paris"}, and optionally "type"'
)


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    Attributes:
        prompt: the text before the answer.
        answer: the correct continuation, with the space at its beginning if it has one.
        type: groups questions in the results.
    """

    prompt: str
    answer: str
    type: str = "questions"


@dataclass(frozen=True)
class AnswerScores:
    """Scores of a model on questions.

    Attributes:
        nlls: negative log-likelihood of each correct answer, in nats, summed over its tokens.
        correct: whether greedy decoding generates the answer.
    """

    nlls: list[float]
    correct: list[bool]

    def select(self, indices: Sequence[int]) -> AnswerScores:
        """Return the scores of some questions."""
        return AnswerScores(
            [self.nlls[index] for index in indices], [self.correct[index] for index in indices]
        )

    @property
    def mean_log_prob(self) -> float:
        """Mean log-probability of an answer, all of its tokens together."""
        return -sum(self.nlls) / len(self.nlls)

    @property
    def recall(self) -> float:
        """Share of questions whose complete answer greedy decoding generates."""
        return sum(self.correct) / len(self.correct)


def benefit_retained(
    with_context: AnswerScores, without_context: AnswerScores, consolidated: AnswerScores
) -> float:
    """Return the share of the context's benefit that remains without it.

    The benefit is the gain in the log-probability of the answers; the share is above 1 if the
    consolidated model is more confident than the model with context, and NaN without a benefit.
    """
    benefit = sum(without_context.nlls) - sum(with_context.nlls)
    return (
        (sum(without_context.nlls) - sum(consolidated.nlls)) / benefit if benefit > 0 else math.nan
    )


def load_questions(path: str | Path) -> list[Question]:
    """Return the questions of a JSONL file.

    Raises:
        UserError: the file cannot be read, a line is not a question, or there is none.
    """
    questions = []
    for location, record in read_json_lines(
        Path(path), f"context.questions={path}", "name a .jsonl file", QUESTION_EXAMPLE
    ):
        is_valid = (
            set(record) <= set(QUESTION_KEYS)
            and all(isinstance(value, str) for value in record.values())
            and record.get("prompt", "").strip()
            and record.get("answer", "").strip()
        )
        if not is_valid:
            raise UserError(
                f"{location} is not a question ({format_fields(record)}); a line is "
                f"{QUESTION_EXAMPLE}"
            )
        questions.append(Question(**record))
    if not questions:
        raise UserError(
            f"context.questions={path} holds no questions; leave context.questions empty for none"
        )
    return questions


def check_question_lengths(
    questions: Sequence[Question], path: str | None, tokenizer: Any, max_tokens: int
) -> None:
    """Raise `UserError` if a question and its answer have more than `max_tokens` tokens."""
    for question in questions:
        num_tokens = len(encode_text(tokenizer, question.prompt, add_prefix=False)) + len(
            encode_text(tokenizer, question.answer, add_prefix=False)
        )
        if num_tokens > max_tokens:
            raise UserError(
                f"context.questions={path}: {format_value(question.prompt)} and its answer have "
                f"{num_tokens:,} tokens, and after a context the model reads "
                f"{max(max_tokens, 0)}; shorten it"
            )


@torch.no_grad()
def score_answers(
    predict: Callable[[Tensor], ForwardOutputs],
    tokenizer: Any,
    questions: Sequence[Question],
    device: torch.device,
) -> AnswerScores:
    """Score the correct answers of questions.

    Args:
        predict: returns the outputs for token ids `(batch, time)`, a question and its answer each,
            padded on the right.
        tokenizer: the model's tokenizer.
        questions: the questions.
        device: where `predict` computes.
    """
    prompt_ids = [
        encode_text(tokenizer, question.prompt, add_prefix=False) for question in questions
    ]
    answer_ids = [
        encode_text(tokenizer, question.answer, add_prefix=False) for question in questions
    ]
    nlls, correct = [0.0] * len(questions), [False] * len(questions)
    progress, num_scored = ProgressLog("measuring", len(questions), " questions"), 0
    for batch in batch_by_length(
        [len(prompt) + len(answer) for prompt, answer in zip(prompt_ids, answer_ids, strict=True)]
    ):
        tokens = pad_token_ids([prompt_ids[index] + answer_ids[index] for index in batch]).to(
            device
        )
        logits = predict(tokens).logits[:, :-1].float()
        token_nlls = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        matches = logits.argmax(-1) == tokens[:, 1:]
        for row, index in enumerate(batch):
            span = slice(
                len(prompt_ids[index]) - 1, len(prompt_ids[index]) + len(answer_ids[index]) - 1
            )
            nlls[index] = float(token_nlls[row, span].sum())
            correct[index] = bool(matches[row, span].all())
        num_scored += len(batch)
        progress.update(num_scored)
    return AnswerScores(nlls, correct)


def best_scores(scores: Sequence[AnswerScores]) -> AnswerScores:
    """Return for each question the score of the model that finds its answer most probable."""
    best_sources = [
        min(range(len(scores)), key=lambda source: scores[source].nlls[index])
        for index in range(len(scores[0].nlls))
    ]
    return AnswerScores(
        [scores[source].nlls[index] for index, source in enumerate(best_sources)],
        [scores[source].correct[index] for index, source in enumerate(best_sources)],
    )
