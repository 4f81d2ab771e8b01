"""Questions with one right answer, and how likely a model finds it: with a context, without, and once it is consolidated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmt.distill.signals import Signals
from dmt.errors import UserError
from dmt.facts.states import batches, encoded, padded
from dmt.texts import json_of, text_of
from dmt.wording import shown

KEYS = ("prompt", "answer", "kind")


@dataclass(frozen=True)
class Question:
    """What is asked and what should be said; `answer` begins with a space where one is to be said; `kind` groups the table."""

    prompt: str
    answer: str
    kind: str = "questions"


@dataclass(frozen=True)
class Answers:
    """Of each of `n` questions the nats of the right answer, and whether it is what greedy decoding would say."""

    nats: list[float]
    right: list[bool]

    def of(self, chosen: Sequence[int]) -> Answers:
        """Those of some questions alone."""
        return Answers([self.nats[i] for i in chosen], [self.right[i] for i in chosen])

    @property
    def mean(self) -> float:
        """Mean log-probability of an answer, all of its tokens together."""
        return -sum(self.nats) / len(self.nats)

    @property
    def recall(self) -> float:
        """Share of questions whose whole answer would be said."""
        return sum(self.right) / len(self.right)


def share_kept(with_context: Answers, without: Answers, consolidated: Answers) -> float:
    """Of what the context does for the answers' log-probability, the share that is there without it; nan where it does nothing."""
    benefit = sum(without.nats) - sum(with_context.nats)
    return (sum(without.nats) - sum(consolidated.nats)) / benefit if benefit > 0 else math.nan


def read_questions(file: str | Path) -> list[Question]:
    """Questions of a JSONL file.

    Raises:
        UserError: the file cannot be read, a line is no question, or there is none.
    """
    text = text_of(Path(file), f"context.questions={file}", "name a .jsonl file")
    questions = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found: Any = json_of(line)
            good = isinstance(found, dict) and set(found) <= set(KEYS) and all(isinstance(value, str) for value in found.values())
        except ValueError:
            good = False
        if not good or not found.get("prompt", "").strip() or not found.get("answer", "").strip():
            raise UserError(
                f'context.questions={file} line {number} is no question; a line is {{"prompt": "The capital of France is", '
                '"answer": " Paris"}, with "kind" if wanted'
            )
        questions.append(Question(**found))
    if not questions:
        raise UserError(f"context.questions={file} holds no questions; leave context.questions empty to ask none")
    return questions


def check_room(questions: Sequence[Question], file: str | None, tokenizer: Any, room: int) -> None:
    """Raise `UserError` where a question and its answer have more than `room` tokens: with the context before them, too many."""
    for question in questions:
        size = len(encoded(tokenizer, question.prompt, start=False)) + len(encoded(tokenizer, question.answer, start=False))
        if size > room:
            raise UserError(
                f"context.questions={file}: {shown(question.prompt)} and its answer have {size:,} tokens, and after a "
                f"context the model reads {max(room, 0)}; shorten it"
            )


@torch.no_grad()
def answers(says: Callable[[Tensor], Signals], tokenizer: Any, questions: Sequence[Question], device: torch.device) -> Answers:
    """How likely each right answer is.

    Args:
        says: what is said of token ids `(batch, time)`, a question and its answer each, padded on the right.
    """
    prompts = [encoded(tokenizer, question.prompt, start=False) for question in questions]
    wanted = [encoded(tokenizer, question.answer, start=False) for question in questions]
    nats, right = [0.0] * len(questions), [False] * len(questions)
    for group in batches([len(prompt) + len(answer) for prompt, answer in zip(prompts, wanted, strict=True)]):
        tokens = padded([prompts[i] + wanted[i] for i in group]).to(device)
        logits = says(tokens).logits[:, :-1].float()
        each = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        hits = logits.argmax(-1) == tokens[:, 1:]
        for row, i in enumerate(group):
            where = slice(len(prompts[i]) - 1, len(prompts[i]) + len(wanted[i]) - 1)
            nats[i], right[i] = float(each[row, where].sum()), bool(hits[row, where].all())
    return Answers(nats, right)


def likeliest(found: Sequence[Answers]) -> Answers:
    """Of several models asked the same, or one that has read several things, the one that finds each answer likeliest."""
    best = [min(range(len(found)), key=lambda which: found[which].nats[i]) for i in range(len(found[0].nats))]
    return Answers([found[which].nats[i] for i, which in enumerate(best)], [found[which].right[i] for i, which in enumerate(best)])
