"""Before the first fact: in what metric states are compared, and how near is near enough."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from dmt.errors import UserError
from dmt.facts.questions import NAMES, QUESTIONS
from dmt.facts.states import encoded, states_at

WINDOW = 128
"""Tokens in a window of prose, or as many as the model reads at all."""
PROSE_TOKENS = 8_192
"""Tokens of prose that are looked at, half of them as they are."""
FLOOR = 0.1
"""Added to every direction's variance, as a share of the mean: no direction is trusted beyond that."""
LOWEST, APART, HIGHEST = 0.5, 0.65, 0.95
"""A row never begins to answer below the first cosine or above the last; two different questions about somebody are nearer
than the second only where a model cannot tell them apart (EXPERIMENTS.md, "Facts")."""
UNDERSTOOD = 0.3
"""Share of questions heard below which a model is taken not to know their language."""
A_NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+(?: [A-Z][a-z]+)*")
"""A name within a sentence of English prose."""


@dataclass(frozen=True)
class Calibration:
    """Of one layer of one model.

    Attributes:
        mean: `(width,)` of states of prose.
        metric: `(width, width)`; a state `x` is compared as `(x - mean) @ metric`, at unit length.
        elsewhere: `(n, width)` states, so compared, in which nothing is asked: prose in which a subject is named.
        otherwise: `(m, width)` the same of many questions about a subject.
        apart: `()` cosine that 95 % of pairs of two different questions about the same subject do not reach.
        heard: share of pairs of two ways to ask one thing that are nearer than 95 % of pairs of two things, in a metric
            that was made from other questions.
    """

    mean: Tensor
    metric: Tensor
    elsewhere: Tensor
    otherwise: Tensor
    apart: Tensor
    heard: float = 0.0

    @property
    def lowest(self) -> float:
        """Cosine below which no row answers: where different questions begin to be told apart."""
        return min(max(float(self.apart), LOWEST), APART)

    def compared(self, hidden: Tensor) -> Tensor:
        """Hidden states `(n, width)` as they are compared."""
        return F.normalize((hidden.float() - self.mean) @ self.metric, dim=-1)

    def reach(self, hidden: Tensor, rate: float, lowest: float | None = None) -> Tensor:
        """From which cosine on rows written in the states `(n, width)` answer, `(n,)`.

        Of places in prose in which their subject is named, and of other questions about it, at most `rate` each are
        nearer: there they answer although nobody asked. In no case do they answer below `lowest`, by default `self.lowest`.
        """
        keys = self.compared(hidden)
        found = []
        for part in keys.split(1_000):  # quantile takes no more than 16 million numbers
            nearer = [(part @ others.t()).quantile(1 - min(1.0, rate), dim=1) for others in (self.elsewhere, self.otherwise)]
            found.append(torch.maximum(*nearer))
        return torch.cat(found).clamp(self.lowest if lowest is None else lowest, HIGHEST)


def calibrate(model: PreTrainedModel, tokenizer: Any, prose: Sequence[str], layers: Sequence[int]) -> dict[int, Calibration]:
    """Measure both at each of `layers`.

    Args:
        prose: documents that neither the model nor the facts are about; held-out text.

    Raises:
        UserError: there is too little prose.
    """
    device = next(model.parameters()).device
    most = model.config.max_position_embeddings
    window = min(WINDOW, most)
    plain = _windows(tokenizer, prose, window)
    named = _windows(tokenizer, [_about(text, NAMES[number % len(NAMES)]) for number, text in enumerate(prose)], window)
    if not plain or not named:
        raise UserError(f"calibration needs held-out prose of {window} tokens at least; name a longer text")
    asked = [encoded(tokenizer, way.format(s=name))[-most:] for ways in QUESTIONS for way in ways for name in NAMES]
    everywhere = [list(range(1, len(text))) for text in plain]
    prose_states = states_at(model, plain, everywhere, layers)
    named_states = states_at(model, named, [list(range(8, len(text))) for text in named], layers)
    question_states = states_at(model, asked, [[len(text) - 1] for text in asked], layers)
    found: dict[int, Calibration] = {}
    for layer in layers:
        states = prose_states[layer].float()
        mean = states.mean(0)
        away = states - mean
        lengths = away.norm(dim=-1)
        away = away[lengths < 20 * lengths.median()]  # tokens that real models give enormous states tell nothing
        questions = question_states[layer].float().view(len(QUESTIONS), len(QUESTIONS[0]), len(NAMES), -1)
        metric = _whitening([away, _within(questions)]).to(device)
        half = Calibration(mean, metric, mean, mean, mean)
        elsewhere, otherwise = half.compared(named_states[layer]), half.compared(question_states[layer])
        heard = _heard(away, mean, questions)
        found[layer] = Calibration(mean, metric, elsewhere, otherwise, _apart(otherwise.view(questions.shape)), heard)
    return found


def candidates(layers: int) -> list[int]:
    """Layers that may listen: at a quarter, the half, three quarters and the end of all."""
    return sorted({min(layers - 1, layers * part // 4) for part in (1, 2, 3, 4)})


def best_listener(found: dict[int, Calibration]) -> int:
    """The layer that tells best what is asked; of a model that does not know the questions' language the lowest.

    There states are nearest to the words.
    """
    best = max(found, key=lambda layer: found[layer].heard)
    return best if found[best].heard >= UNDERSTOOD else min(found)


def _within(questions: Tensor) -> Tensor:
    """How one question differs from itself asked in another way, `(n, width)`."""
    return (questions - questions.mean(1, keepdim=True)).flatten(0, -2)


def _apart(questions: Tensor) -> Tensor:
    """Cosine that 95 % of pairs of different questions do not reach; states `(things, ways, names, width)`, as compared."""
    things = len(questions)
    cosines = torch.einsum("qanw,pbnw->nabqp", questions, questions).flatten(0, 2)
    return cosines[:, ~torch.eye(things, dtype=torch.bool, device=cosines.device)].quantile(0.95)


def _heard(prose: Tensor, mean: Tensor, questions: Tensor) -> float:
    shares = []
    for ours, others in ((questions[::2], questions[1::2]), (questions[1::2], questions[::2])):
        half = Calibration(mean, _whitening([prose, _within(others)]).to(mean.device), mean, mean, mean)
        things, ways, names, _ = ours.shape
        states = half.compared(ours.flatten(0, 2)).view(things, ways, names, -1)
        for first, second in ((0, 1), (0, 2), (1, 2)):
            cosines = torch.einsum("qnw,pnw->nqp", states[:, first], states[:, second])
            same = torch.eye(things, dtype=torch.bool, device=cosines.device)
            shares.append((cosines[:, same] > cosines[:, ~same].quantile(0.95)).float().mean())
    return float(torch.stack(shares).mean())


def _whitening(samples: Sequence[Tensor]) -> Tensor:
    """The inverse root of the mean of the samples' covariances, each of trace 1, `(width, width)`."""
    width = samples[0].shape[1]
    total = torch.zeros(width, width, dtype=torch.double)
    for sample in samples:
        covariance = sample.double().cpu().t() @ sample.double().cpu()
        total += covariance / covariance.trace().clamp_min(1e-12) / len(samples)
    values, vectors = torch.linalg.eigh(total + FLOOR / width * torch.eye(width, dtype=torch.double))
    return (vectors * values.rsqrt() @ vectors.t() / width**0.5).float()


def _windows(tokenizer: Any, prose: Sequence[str], length: int) -> list[list[int]]:
    """Windows of prose of so many tokens, from as many documents as there are."""
    count = PROSE_TOKENS // 2 // length
    windows: list[list[int]] = []
    for number in range(count):
        if not prose:
            break
        text = prose[number % len(prose)]
        start = number // len(prose) * 6 * length
        ids = encoded(tokenizer, text[start : start + 8 * length])[:length]
        if len(ids) == length:
            windows.append(ids)
    return windows


def _about(text: str, name: str) -> str:
    """Prose in which everybody has the same name."""
    return A_NAME.sub(name, text)
