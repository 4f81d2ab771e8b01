"""Calibration of the layer that facts are matched in: its metric, and how near is near enough.

Two phrasings of a question should be near in the metric, two different questions should not. The
prompts in `assets/calibration_prompts.json` ask 40 questions in three phrasings about five names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from dmt.errors import UserError
from dmt.models.forward import collect_hidden_states, encode_text
from dmt.ops import inverse_sqrt

PROMPTS_FILE = "calibration_prompts.json"
PROSE_WINDOW_TOKENS = 128  # length of a window of prose, or as many as the model has positions
PROSE_TOKENS = 8_192  # tokens of prose that are measured, half of them with names substituted
# Added to the variance in every direction, as a share of the mean variance.
VARIANCE_FLOOR = 0.1
# No row fires below the first cosine, or needs more than the last. Two different questions about
# a subject are nearer than the second only where a model cannot distinguish them (EXPERIMENTS.md,
# "Facts").
MIN_THRESHOLD, MAX_QUESTION_THRESHOLD, MAX_THRESHOLD = 0.5, 0.65, 0.95
# Share of paraphrases that are recognized, below which a model does not know their language.
MIN_PARAPHRASE_ACCURACY = 0.3
NAME_PATTERN = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+(?: [A-Z][a-z]+)*")  # within English prose


@dataclass(frozen=True)
class Calibration:
    """The calibration of one layer of one model.

    Attributes:
        mean: `(width,)` mean hidden state of prose.
        metric: `(width, width)`; a state `x` is whitened as `(x - mean) @ metric`, at unit length.
        prose_negatives: `(n, width)` whitened states of prose in which a name occurs.
        question_negatives: `(m, width)` whitened states of many questions about a subject.
        question_cosine_p95: `()` cosine that 95 % of pairs of two different questions about the
            same subject do not reach.
        paraphrase_accuracy: share of pairs of two phrasings that are nearer than 95 % of pairs of
            two questions, in a metric that was fitted to other questions.
    """

    mean: Tensor
    metric: Tensor
    prose_negatives: Tensor
    question_negatives: Tensor
    question_cosine_p95: Tensor
    paraphrase_accuracy: float = 0.0

    @property
    def min_threshold(self) -> float:
        """The cosine below which no row fires, since different questions are nearer."""
        return min(max(float(self.question_cosine_p95), MIN_THRESHOLD), MAX_QUESTION_THRESHOLD)

    def whiten(self, hidden: Tensor) -> Tensor:
        """Return hidden states `(n, width)` in the metric, at unit length."""
        return F.normalize((hidden.float() - self.mean) @ self.metric, dim=-1)

    def thresholds(
        self, hidden: Tensor, false_positive_rate: float, min_threshold: float | None = None
    ) -> Tensor:
        """Compute the cosines `(n,)` from which on rows fire.

        Args:
            hidden: `(n, width)` the hidden states in which the rows were written.
            false_positive_rate: share of the prose negatives, and of the question negatives, that
                may be nearer than the threshold.
            min_threshold: lowest threshold; `self.min_threshold` where it is None.
        """
        keys = self.whiten(hidden)
        chunk_thresholds = []
        for chunk in keys.split(1_000):  # quantile takes no more than 16 million numbers
            quantiles = [
                (chunk @ negatives.t()).quantile(1 - min(1.0, false_positive_rate), dim=1)
                for negatives in (self.prose_negatives, self.question_negatives)
            ]
            chunk_thresholds.append(torch.maximum(*quantiles))
        return torch.cat(chunk_thresholds).clamp(
            self.min_threshold if min_threshold is None else min_threshold, MAX_THRESHOLD
        )


def calibrate(
    model: PreTrainedModel, tokenizer: Any, prose: Sequence[str], layers: Sequence[int]
) -> dict[int, Calibration]:
    """Calibrate each of `layers`.

    Args:
        model: without facts, or with its facts disabled.
        tokenizer: of the model.
        prose: held-out documents that the facts are not about.
        layers: the candidates for the key layer.

    Raises:
        UserError: there is too little prose.
    """
    questions, names = load_prompts()
    device = next(model.parameters()).device
    max_tokens = model.config.max_position_embeddings
    window_length = min(PROSE_WINDOW_TOKENS, max_tokens)
    prose_windows = _tokenize_windows(tokenizer, prose, window_length)
    named_prose = [
        _substitute_names(text, names[index % len(names)]) for index, text in enumerate(prose)
    ]
    named_windows = _tokenize_windows(tokenizer, named_prose, window_length)
    if not prose_windows or not named_windows:
        raise UserError(
            f"calibration needs held-out prose of {window_length} tokens at least; give a longer "
            "text"
        )
    question_ids = [
        encode_text(tokenizer, phrasing.format(s=name))[-max_tokens:]
        for phrasings in questions
        for phrasing in phrasings
        for name in names
    ]
    prose_positions = [list(range(1, len(text))) for text in prose_windows]
    prose_states = collect_hidden_states(model, prose_windows, prose_positions, layers)
    named_states = collect_hidden_states(
        model, named_windows, [list(range(8, len(text))) for text in named_windows], layers
    )
    question_states = collect_hidden_states(
        model, question_ids, [[len(text) - 1] for text in question_ids], layers
    )
    calibrations: dict[int, Calibration] = {}
    for layer in layers:
        states = prose_states[layer].float()
        mean = states.mean(0)
        centered = states - mean
        norms = centered.norm(dim=-1)
        # Real models have tokens with enormous states, which would dominate the covariance.
        centered = centered[norms < 20 * norms.median()]
        grid = (len(questions), len(questions[0]), len(names), -1)
        layer_questions = question_states[layer].float().view(grid)
        deviations = _compute_paraphrase_deviations(layer_questions)
        metric = _compute_whitening([centered, deviations]).to(device)
        whitening = Calibration(mean, metric, mean, mean, mean)
        question_negatives = whitening.whiten(question_states[layer])
        calibrations[layer] = Calibration(
            mean,
            metric,
            whitening.whiten(named_states[layer]),
            question_negatives,
            _compute_question_cosine_p95(question_negatives.view(layer_questions.shape)),
            _measure_paraphrase_accuracy(centered, mean, layer_questions),
        )
    return calibrations


@cache
def load_prompts() -> tuple[list[list[str]], list[str]]:
    """Return the questions, each in three phrasings with `{s}` for the subject, and the names."""
    text = files("dmt").joinpath("assets", PROMPTS_FILE).read_text(encoding="utf-8")
    prompts = json.loads(text)
    return prompts["questions"], prompts["names"]


def list_candidate_layers(num_layers: int) -> list[int]:
    """List the candidates for the key layer: at a quarter, half, three quarters and the end."""
    return sorted({min(num_layers - 1, num_layers * quarter // 4) for quarter in (1, 2, 3, 4)})


def choose_key_layer(calibrations: dict[int, Calibration]) -> int:
    """Choose the layer that recognizes paraphrases best.

    For a model that does not know the questions' language this is the lowest layer, where states
    are nearest to the words.
    """
    best = max(calibrations, key=lambda layer: calibrations[layer].paraphrase_accuracy)
    if calibrations[best].paraphrase_accuracy >= MIN_PARAPHRASE_ACCURACY:
        return best
    return min(calibrations)


def _compute_paraphrase_deviations(questions: Tensor) -> Tensor:
    """Compute how phrasings differ from their question's mean, `(n, width)`."""
    return (questions - questions.mean(1, keepdim=True)).flatten(0, -2)


def _compute_question_cosine_p95(questions: Tensor) -> Tensor:
    """Compute the cosine that 95 % of pairs of different questions do not reach.

    Args:
        questions: whitened states `(questions, phrasings, names, width)`.
    """
    num_questions = len(questions)
    cosines = torch.einsum("qanw,pbnw->nabqp", questions, questions).flatten(0, 2)
    is_different = ~torch.eye(num_questions, dtype=torch.bool, device=cosines.device)
    return cosines[:, is_different].quantile(0.95)


def _measure_paraphrase_accuracy(prose: Tensor, mean: Tensor, questions: Tensor) -> float:
    """Measure `Calibration.paraphrase_accuracy`, each half of the questions in the other's metric.

    Args:
        prose: centered states `(n, width)` of prose.
        mean: `(width,)`.
        questions: states `(questions, phrasings, names, width)`.
    """
    accuracies = []
    halves = questions[::2], questions[1::2]
    for eval_questions, fit_questions in (halves, halves[::-1]):
        deviations = _compute_paraphrase_deviations(fit_questions)
        metric = _compute_whitening([prose, deviations]).to(mean.device)
        whitening = Calibration(mean, metric, mean, mean, mean)
        states = whitening.whiten(eval_questions.flatten(0, 2)).view(eval_questions.shape)
        num_questions = len(eval_questions)
        same_question = torch.eye(num_questions, dtype=torch.bool, device=states.device)
        for first, second in ((0, 1), (0, 2), (1, 2)):
            cosines = torch.einsum("qnw,pnw->nqp", states[:, first], states[:, second])
            limit = cosines[:, ~same_question].quantile(0.95)
            accuracies.append((cosines[:, same_question] > limit).float().mean())
    return float(torch.stack(accuracies).mean())


def _compute_whitening(samples: Sequence[Tensor]) -> Tensor:
    """Compute the inverse root of the mean covariance of `samples`, each scaled to trace 1."""
    width = samples[0].shape[1]
    total = torch.zeros(width, width, dtype=torch.double)
    for sample in samples:
        sample = sample.cpu().double()  # in this order: not every device has float64
        covariance = sample.t() @ sample
        total += covariance / covariance.trace().clamp_min(1e-12) / len(samples)
    floor = VARIANCE_FLOOR / width * torch.eye(width, dtype=torch.double)
    return (inverse_sqrt(total + floor) / width**0.5).float()


def _tokenize_windows(tokenizer: Any, prose: Sequence[str], length: int) -> list[list[int]]:
    """Cut windows of `length` tokens from all documents in turn."""
    count = PROSE_TOKENS // 2 // length
    windows: list[list[int]] = []
    for index in range(count):
        if not prose:
            break
        text = prose[index % len(prose)]
        start = index // len(prose) * 6 * length
        ids = encode_text(tokenizer, text[start : start + 8 * length])[:length]
        if len(ids) == length:
            windows.append(ids)
    return windows


def _substitute_names(text: str, name: str) -> str:
    """Replace all names in a text by `name`."""
    return NAME_PATTERN.sub(name, text)
