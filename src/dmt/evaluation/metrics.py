"""Teacher and student side by side: the same code, the same held-out tokens."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from dmt.data.synthetic import Probe
from dmt.data.windows import get_prefix_ids
from dmt.distributed import all_reduce_sum
from dmt.models.forward import forward_with_activations
from dmt.ops import kl


def _safe_exp(log_value: float) -> float:
    """`math.exp`, infinite where the number would be too large."""
    return math.exp(log_value) if log_value < 700 else math.inf


@dataclass
class FidelityMetrics:
    """Sums over tokens, to be added up over batches and read as means."""

    tokens: float = 0  # that have a next token
    teacher_nll: float = 0
    student_nll: float = 0
    kl_sum: float = 0
    top1_matches: float = 0

    def update(self, student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor) -> None:
        """Count one batch: logits `(batch, time, vocabulary)` of both for token ids `(batch, time)`."""
        student_shifted, teacher_shifted, targets = (
            student_logits[:, :-1].float(),
            teacher_logits[:, :-1].float(),
            tokens[:, 1:].flatten(),
        )
        self.tokens += targets.numel()
        self.teacher_nll += float(
            F.cross_entropy(teacher_shifted.flatten(0, 1), targets, reduction="sum")
        )
        self.student_nll += float(
            F.cross_entropy(student_shifted.flatten(0, 1), targets, reduction="sum")
        )
        self.kl_sum += float(kl(student_shifted, teacher_shifted).sum())
        self.top1_matches += float((student_shifted.argmax(-1) == teacher_shifted.argmax(-1)).sum())

    def all_reduce(self) -> FidelityMetrics:
        """What this and those of all other processes that train together add up to; all have to ask."""
        return FidelityMetrics(
            *all_reduce_sum(torch.tensor(astuple(self), dtype=torch.double)).tolist()
        )

    @property
    def teacher_perplexity(self) -> float:
        """Perplexity of the text for the teacher."""
        return _safe_exp(self.teacher_nll / self.tokens)

    @property
    def student_perplexity(self) -> float:
        """Perplexity of the text for the student."""
        return _safe_exp(self.student_nll / self.tokens)

    @property
    def ppl_ratio(self) -> float:
        """Student's perplexity over the teacher's."""
        return _safe_exp((self.student_nll - self.teacher_nll) / self.tokens)

    @property
    def kl(self) -> float:
        """KL(teacher || student), nats per token."""
        return self.kl_sum / self.tokens

    @property
    def top1_agreement(self) -> float:
        """Share of tokens for which both find the same next token most likely."""
        return self.top1_matches / self.tokens


@torch.no_grad()
def measure_fidelity(
    student: PreTrainedModel, teacher: PreTrainedModel, windows: Tensor, batch_size: int = 8
) -> FidelityMetrics:
    """Both models on token ids `(windows, time)`; each window on its own, so stride equals the window."""
    was_training = student.training
    student.eval()
    metrics, device = FidelityMetrics(), next(student.parameters()).device
    for tokens in windows.split(batch_size):
        tokens = tokens.to(device)
        metrics.update(
            forward_with_activations(student, tokens).logits,
            forward_with_activations(teacher, tokens).logits,
            tokens,
        )
    student.train(was_training)
    return metrics


@torch.no_grad()
def measure_recall(
    model: PreTrainedModel, tokenizer: Any, probes: list[Probe], batch_size: int = 128
) -> float:
    """Share of probes whose whole answer is what greedy decoding would say."""
    was_training = model.training
    model.eval()
    correct, device = 0, next(model.parameters()).device
    prefix = get_prefix_ids(tokenizer)
    prompts = [
        prefix + tokenizer(probe.prompt, add_special_tokens=False)["input_ids"] for probe in probes
    ]
    answers = [tokenizer(probe.answer, add_special_tokens=False)["input_ids"] for probe in probes]
    order = sorted(range(len(probes)), key=lambda i: len(prompts[i]) + len(answers[i]))
    for indices in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
        sequences = [torch.tensor(prompts[i] + answers[i]) for i in indices]
        # Padding stands on the right, where a causal model cannot see it.
        tokens = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(device)
        predicted = forward_with_activations(model, tokens).logits[:, :-1].argmax(-1)
        matches = predicted == tokens[:, 1:]
        for row, i in enumerate(indices):
            end = len(prompts[i]) + len(answers[i]) - 1
            correct += bool(matches[row, len(prompts[i]) - 1 : end].all())
    model.train(was_training)
    return correct / len(probes)


@torch.no_grad()
def generate_greedy(model: PreTrainedModel, prompts: Tensor, max_new_tokens: int) -> Tensor:
    """Greedy continuations `(prompts, tokens)` of token ids `(prompts, time)`."""
    was_training = model.training
    model.eval()
    prompts = prompts.to(next(model.parameters()).device)
    generated = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )  # type: ignore[operator]
    model.train(was_training)
    return generated[:, prompts.shape[1] :]
