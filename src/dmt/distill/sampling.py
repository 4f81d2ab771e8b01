"""A distribution by k of its outcomes: the likeliest for certain, a sample of the rest, so that sums over all can be estimated.

A teacher's tail is heavy: beyond its 128 likeliest of 2,048 tokens the embedded one keeps seven percent of its probability.
Counting the rest as one outcome takes 5 to 10 percent off the KL. Sampled outcomes that stand for those left out do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

LEAST = 1e-27
"""Probability below which outcomes are not told apart."""
CAUTION = 4.0
"""How fast the second estimate of a tail loses weight where student and teacher part; measured in EXPERIMENTS.md."""


@dataclass(frozen=True)
class Sampled:
    """Distributions of some tokens, each by k outcomes.

    An outcome at least as likely as the token's `threshold` is there for certain and counts as it is. A less likely one is
    there with chance probability / threshold, and counts as `threshold`, for others too. What counts sums to one.

    Attributes:
        ids: which outcomes, `(tokens, k)`, long.
        logs: the natural logarithm of each one's probability, `(tokens, k)`.
        threshold: `(tokens, 1)`.
    """

    ids: Tensor
    logs: Tensor
    threshold: Tensor

    def __getitem__(self, piece: slice) -> Sampled:
        return Sampled(self.ids[piece], self.logs[piece], self.threshold[piece])

    @property
    def weights(self) -> Tensor:
        """What each outcome counts in a sum over all, `(tokens, k)`."""
        return torch.maximum(self.logs.exp(), self.threshold)


@torch.no_grad()
def sample(logits: Tensor, k: int, places: Tensor) -> Sampled:
    """The distributions of `logits` `(tokens, vocabulary)` by `k` different outcomes each.

    The threshold is the one with which chances sum to k. Outcomes below it are taken at even steps through the vocabulary,
    a step being a threshold's worth of probability.

    Args:
        places: where in its first step each token begins, `(tokens, 1)` in [0, 1), the only thing that is random.

    Source: Horvitz and Thompson 1952 (what has chance c counts 1 / c); Madow 1949 (sampling at even steps).
    """
    logits = logits.float()
    norm = logits.logsumexp(-1, keepdim=True)
    p = (logits - norm).exp_().clamp_(min=LEAST)
    best = p.topk(k)
    likeliest = best.values.double()
    outside = p.scatter_(-1, best.indices, 0.0).sum(-1, keepdim=True, dtype=torch.float64)
    rest = likeliest.flip(-1).cumsum(-1).flip(-1) + outside
    order = torch.arange(k, device=p.device).expand_as(best.indices)
    thresholds = rest / (k - order)  # where the first 0, 1, ... are there for certain
    enough = likeliest < thresholds
    enough[:, -1] = True
    certain = enough.int().argmax(-1, keepdim=True)
    walk = p.scatter_(-1, best.indices, best.values.where(order >= certain, 0.0)).cumsum(-1, dtype=torch.float64)
    steps = (order - certain + places.clamp(1e-6, 1 - 1e-6)) / (k - certain) * walk[:, -1:]
    found = torch.searchsorted(walk, steps.clamp(min=0), right=True).clamp(max=p.shape[1] - 1)
    ids = best.indices.where(order < certain, found).sort(-1).values
    assert (ids.diff(dim=-1) > 0).all(), "an outcome below the threshold is met once"
    logs = (logits.gather(-1, ids) - norm).clamp(min=log(LEAST))
    return Sampled(ids, logs, thresholds.gather(-1, certain).float())


def sampled_kl(student: Tensor, teacher: Sampled, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) per token in nats, times temperature squared; logits `(tokens, vocabulary)` to `(tokens,)`.

    Value and gradient are right on average over samples. That of `sum of p log(p / q)` alone would be noisy, so what is known
    of another sum is used: the q of the outcomes sampled, by what each stands for, must come to one. Where student and teacher
    are close the two errors cancel; where they are not the second is the larger, so it counts by how close they are on what is
    there for certain. A temperature is the one that the teacher's logits were divided by when its outcomes were taken.
    """
    given = torch.log_softmax(student.float() / temperature, -1).gather(-1, teacher.ids)
    weights = teacher.weights
    balance = (weights / teacher.logs.exp() * given.exp()).sum(-1) - 1
    return ((weights * (teacher.logs - given)).sum(-1) + closeness(teacher, given.detach()) * balance) * temperature**2


def closeness(teacher: Sampled, given: Tensor) -> Tensor:
    """How close `given`, logarithms `(tokens, k)`, are to the teacher's on what is there for certain: `(tokens,)` in (0, 1]."""
    certain = teacher.logs.exp() * (teacher.logs.exp() >= teacher.threshold)
    return 1 / (1 + CAUTION * (certain * (teacher.logs - given).square()).sum(-1))
