"""Teacher and student side by side: the same code, the same held-out tokens."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from dmt.data.encoding import start_of
from dmt.data.people import Probe
from dmt.distill.losses import kl
from dmt.distill.signals import observe
from dmt.memory.together import summed


def _exp(nats: float) -> float:
    """`math.exp`, infinite where the number would be too large."""
    return math.exp(nats) if nats < 700 else math.inf


@dataclass
class Tally:
    """Sums over tokens, to be added up over batches and read as means."""

    tokens: float = 0  # that have a next token
    teacher_nats: float = 0
    student_nats: float = 0
    kl_nats: float = 0
    agreements: float = 0

    def add(self, student: Tensor, teacher: Tensor, tokens: Tensor) -> None:
        """Count one batch: logits `(batch, time, vocabulary)` of both for token ids `(batch, time)`."""
        mine, theirs, targets = student[:, :-1].float(), teacher[:, :-1].float(), tokens[:, 1:].flatten()
        self.tokens += targets.numel()
        self.teacher_nats += float(F.cross_entropy(theirs.flatten(0, 1), targets, reduction="sum"))
        self.student_nats += float(F.cross_entropy(mine.flatten(0, 1), targets, reduction="sum"))
        self.kl_nats += float(kl(mine, theirs).sum())
        self.agreements += float((mine.argmax(-1) == theirs.argmax(-1)).sum())

    def of_all(self) -> Tally:
        """What this and those of all other processes that train together add up to; all have to ask."""
        return Tally(*summed(torch.tensor(astuple(self), dtype=torch.double)).tolist())

    @property
    def teacher_perplexity(self) -> float:
        """Perplexity of the text for the teacher."""
        return _exp(self.teacher_nats / self.tokens)

    @property
    def student_perplexity(self) -> float:
        """Perplexity of the text for the student."""
        return _exp(self.student_nats / self.tokens)

    @property
    def ratio(self) -> float:
        """Student's perplexity over the teacher's."""
        return _exp((self.student_nats - self.teacher_nats) / self.tokens)

    @property
    def kl(self) -> float:
        """KL(teacher || student), nats per token."""
        return self.kl_nats / self.tokens

    @property
    def agreement(self) -> float:
        """Share of tokens for which both find the same next token most likely."""
        return self.agreements / self.tokens


@torch.no_grad()
def compare(student: PreTrainedModel, teacher: PreTrainedModel, windows: Tensor, batch: int = 8) -> Tally:
    """Both models on token ids `(windows, time)`; each window on its own, so stride equals the window."""
    was_training = student.training
    student.eval()
    tally, device = Tally(), next(student.parameters()).device
    for tokens in windows.split(batch):
        tokens = tokens.to(device)
        tally.add(observe(student, tokens).logits, observe(teacher, tokens).logits, tokens)
    student.train(was_training)
    return tally


@torch.no_grad()
def recall(model: PreTrainedModel, tokenizer: Any, probes: list[Probe], batch: int = 128) -> float:
    """Share of probes whose whole answer is what greedy decoding would say."""
    was_training = model.training
    model.eval()
    right, device = 0, next(model.parameters()).device
    start = start_of(tokenizer)
    prompts = [start + tokenizer(p.prompt, add_special_tokens=False)["input_ids"] for p in probes]
    answers = [tokenizer(p.answer, add_special_tokens=False)["input_ids"] for p in probes]
    order = sorted(range(len(probes)), key=lambda i: len(prompts[i]) + len(answers[i]))
    for group in (order[i : i + batch] for i in range(0, len(order), batch)):
        rows = [torch.tensor(prompts[i] + answers[i]) for i in group]
        # Padding stands on the right, where a causal model cannot see it.
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        said = observe(model, tokens).logits[:, :-1].argmax(-1)
        hits = said == tokens[:, 1:]
        for row, i in enumerate(group):
            end = len(prompts[i]) + len(answers[i]) - 1
            right += bool(hits[row, len(prompts[i]) - 1 : end].all())
    model.train(was_training)
    return right / len(probes)


@torch.no_grad()
def continuations(model: PreTrainedModel, prompts: Tensor, tokens: int) -> Tensor:
    """Greedy continuations `(prompts, tokens)` of token ids `(prompts, time)`."""
    was_training = model.training
    model.eval()
    prompts = prompts.to(next(model.parameters()).device)
    said = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )  # type: ignore[operator]
    model.train(was_training)
    return said[:, prompts.shape[1] :]
