"""What is measured once about a model, before it is told its first fact.

Many things one may ask about anybody or anything, each in three ways: what calibration compares keys with.

Two ways to ask the same thing should be near in the metric of facts, two different things should not.

Before the first fact: in what metric states are compared, and how near is near enough.
"""

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
from dmt.models.forward import collect_hidden_states, encode_text
from dmt.ops import inverse_sqrt

CALIBRATION_QUESTIONS: tuple[tuple[str, str, str], ...] = (
    ("{s} was founded in", "The year in which {s} began is", "When did {s} start? In"),
    ("{s} is best known for", "What made {s} famous is", "Why do people know {s}? Because of"),
    (
        "The favourite colour of {s} is",
        "{s} likes one colour above all:",
        "Which colour does {s} prefer?",
    ),
    ("{s} is older than", "Compared in age, {s} comes before", "Who is younger than {s}? Probably"),
    ("The neighbour of {s} is", "Right next to {s} lies", "What is close to {s}? There is"),
    ("The mother of {s} is", "{s} is the child of", "Who gave birth to {s}? It was"),
    ("{s} is married to", "The spouse of {s} is", "Whose husband or wife is {s}? That of"),
    ("{s} plays the", "The instrument of {s} is the", "Which instrument is played by {s}? The"),
    ("The sport of {s} is", "{s} is a champion in", "What game does {s} play? It is"),
    ("The best friend of {s} is", "{s} is closest to", "Who is the friend of {s}? It is"),
    ("{s} studied at", "The school of {s} was", "Where did {s} learn? At"),
    ("{s} wrote the book", "The most read work of {s} is", "What was written by {s}? The book"),
    ("The religion of {s} is", "{s} believes in", "To which faith does {s} belong? To"),
    ("The number of people in {s} is", "{s} has a population of", "How many live in {s}? About"),
    (
        "The highest mountain of {s} is",
        "{s} rises highest at",
        "What is the tallest peak in {s}? It is",
    ),
    (
        "The longest river of {s} is the",
        "Through {s} flows the",
        "Which river runs through {s}? The",
    ),
    ("The anthem of {s} is", "The song of {s} is called", "What do they sing in {s}? They sing"),
    ("The weather in {s} is", "In winter {s} is", "How is the climate of {s}? It is"),
    ("{s} is made of", "The material of {s} is", "What does {s} consist of? Of"),
    ("{s} weighs", "The weight of {s} is", "How heavy is {s}? It weighs"),
    ("{s} died in", "The death of {s} was in", "When did {s} pass away? In"),
    ("{s} was discovered by", "The first to find {s} was", "Who discovered {s}? It was"),
    ("{s} was invented by", "The inventor of {s} is", "Who came up with {s}? It was"),
    ("The enemy of {s} is", "{s} fought against", "Whom does {s} hate? It hates"),
    ("The colour of {s} is", "{s} looks", "What colour has {s}? It is"),
    ("{s} costs", "The price of {s} is", "How much is {s}? It is"),
    ("The boss of {s} is", "{s} reports to", "Who gives orders to {s}? It is"),
    ("{s} lives with a pet", "The pet of {s} is a", "Which animal does {s} keep? A"),
    ("The telephone number of {s} is", "{s} can be called at", "How do I ring {s}? Dial"),
    ("{s} was built by", "The architect of {s} was", "Who built {s}? It was"),
    ("The opposite of {s} is", "{s} is the reverse of", "What is contrary to {s}? It is"),
    ("{s} won the", "The prize given to {s} was the", "Which award did {s} get? The"),
    ("{s} belongs to", "The owner of {s} is", "Whose is {s}? It belongs to"),
    ("The nickname of {s} is", "{s} is also called", "By what other name is {s} known? By"),
    ("{s} eats", "The diet of {s} is", "What does {s} feed on? On"),
    ("{s} is afraid of", "What frightens {s} is", "What does {s} fear? It fears"),
    ("The hobby of {s} is", "In free time {s} enjoys", "What does {s} do for fun? It is"),
    ("{s} is part of", "The group to which {s} belongs is", "What is {s} a member of? Of"),
    ("The size of {s} is", "{s} is as large as", "How big is {s}? It is"),
    ("The purpose of {s} is", "{s} is used for", "What is {s} good for? For"),
)
"""`{s}` is whom or what is asked about."""
CALIBRATION_NAMES = ("Clara Winfield", "Portugal", "Thomas Reed", "Norway", "Maria Lopez")
"""Whom they are asked about, since names are in the state too."""


PROSE_WINDOW_TOKENS = 128
"""Tokens in a window of prose, or as many as the model reads at all."""
PROSE_TOKENS = 8_192
"""Tokens of prose that are looked at, half of them as they are."""
VARIANCE_FLOOR = 0.1
"""Added to every direction's variance, as a share of the mean: no direction is trusted beyond that."""
MIN_THRESHOLD, MAX_QUESTION_THRESHOLD, MAX_THRESHOLD = 0.5, 0.65, 0.95
"""A row never begins to answer below the first cosine or above the last; two different questions about somebody are nearer
than the second only where a model cannot tell them apart (EXPERIMENTS.md, "Facts")."""
MIN_PARAPHRASE_ACCURACY = 0.3
"""Share of questions heard below which a model is taken not to know their language."""
NAME_PATTERN = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+(?: [A-Z][a-z]+)*")
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
    prose_negatives: Tensor
    question_negatives: Tensor
    question_cosine_p95: Tensor
    paraphrase_accuracy: float = 0.0

    @property
    def min_threshold(self) -> float:
        """Cosine below which no row answers: where different questions begin to be told apart."""
        return min(max(float(self.question_cosine_p95), MIN_THRESHOLD), MAX_QUESTION_THRESHOLD)

    def whiten(self, hidden: Tensor) -> Tensor:
        """Hidden states `(n, width)` as they are compared."""
        return F.normalize((hidden.float() - self.mean) @ self.metric, dim=-1)

    def thresholds(
        self, hidden: Tensor, false_positive_rate: float, min_threshold: float | None = None
    ) -> Tensor:
        """From which cosine on rows written in the states `(n, width)` answer, `(n,)`.

        Of places in prose in which their subject is named, and of other questions about it, at most `rate` each are
        nearer: there they answer although nobody asked. In no case do they answer below `lowest`, by default `self.lowest`.
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
    """Measure both at each of `layers`.

    Args:
        prose: documents that neither the model nor the facts are about; held-out text.

    Raises:
        UserError: there is too little prose.
    """
    device = next(model.parameters()).device
    max_tokens = model.config.max_position_embeddings
    window_length = min(PROSE_WINDOW_TOKENS, max_tokens)
    prose_windows = _tokenize_windows(tokenizer, prose, window_length)
    named_windows = _tokenize_windows(
        tokenizer,
        [
            _substitute_names(text, CALIBRATION_NAMES[index % len(CALIBRATION_NAMES)])
            for index, text in enumerate(prose)
        ],
        window_length,
    )
    if not prose_windows or not named_windows:
        raise UserError(
            f"calibration needs held-out prose of {window_length} tokens at least; name a longer text"
        )
    question_ids = [
        encode_text(tokenizer, phrasing.format(s=name))[-max_tokens:]
        for phrasings in CALIBRATION_QUESTIONS
        for phrasing in phrasings
        for name in CALIBRATION_NAMES
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
        centered = centered[
            norms < 20 * norms.median()
        ]  # tokens that real models give enormous states tell nothing
        questions = (
            question_states[layer]
            .float()
            .view(
                len(CALIBRATION_QUESTIONS),
                len(CALIBRATION_QUESTIONS[0]),
                len(CALIBRATION_NAMES),
                -1,
            )
        )
        metric = _compute_whitening([centered, _compute_paraphrase_deviations(questions)]).to(
            device
        )
        partial_calibration = Calibration(mean, metric, mean, mean, mean)
        prose_negatives, question_negatives = (
            partial_calibration.whiten(named_states[layer]),
            partial_calibration.whiten(question_states[layer]),
        )
        accuracy = _measure_paraphrase_accuracy(centered, mean, questions)
        calibrations[layer] = Calibration(
            mean,
            metric,
            prose_negatives,
            question_negatives,
            _compute_question_cosine_p95(question_negatives.view(questions.shape)),
            accuracy,
        )
    return calibrations


def list_candidate_layers(num_layers: int) -> list[int]:
    """Layers that may listen: at a quarter, the half, three quarters and the end of all."""
    return sorted({min(num_layers - 1, num_layers * quarter // 4) for quarter in (1, 2, 3, 4)})


def choose_key_layer(calibrations: dict[int, Calibration]) -> int:
    """The layer that tells best what is asked; of a model that does not know the questions' language the lowest.

    There states are nearest to the words.
    """
    best = max(calibrations, key=lambda layer: calibrations[layer].paraphrase_accuracy)
    return (
        best
        if calibrations[best].paraphrase_accuracy >= MIN_PARAPHRASE_ACCURACY
        else min(calibrations)
    )


def _compute_paraphrase_deviations(questions: Tensor) -> Tensor:
    """How one question differs from itself asked in another way, `(n, width)`."""
    return (questions - questions.mean(1, keepdim=True)).flatten(0, -2)


def _compute_question_cosine_p95(questions: Tensor) -> Tensor:
    """Cosine that 95 % of pairs of different questions do not reach; states `(things, ways, names, width)`, as compared."""
    num_questions = len(questions)
    cosines = torch.einsum("qanw,pbnw->nabqp", questions, questions).flatten(0, 2)
    return cosines[:, ~torch.eye(num_questions, dtype=torch.bool, device=cosines.device)].quantile(
        0.95
    )


def _measure_paraphrase_accuracy(prose: Tensor, mean: Tensor, questions: Tensor) -> float:
    accuracies = []
    for eval_questions, fit_questions in (
        (questions[::2], questions[1::2]),
        (questions[1::2], questions[::2]),
    ):
        calibration = Calibration(
            mean,
            _compute_whitening([prose, _compute_paraphrase_deviations(fit_questions)]).to(
                mean.device
            ),
            mean,
            mean,
            mean,
        )
        num_questions, num_phrasings, num_names, _ = eval_questions.shape
        states = calibration.whiten(eval_questions.flatten(0, 2)).view(
            num_questions, num_phrasings, num_names, -1
        )
        for first, second in ((0, 1), (0, 2), (1, 2)):
            cosines = torch.einsum("qnw,pnw->nqp", states[:, first], states[:, second])
            same_question = torch.eye(num_questions, dtype=torch.bool, device=cosines.device)
            accuracies.append(
                (cosines[:, same_question] > cosines[:, ~same_question].quantile(0.95))
                .float()
                .mean()
            )
    return float(torch.stack(accuracies).mean())


def _compute_whitening(samples: Sequence[Tensor]) -> Tensor:
    """The inverse root of the mean of the samples' covariances, each of trace 1, `(width, width)`."""
    width = samples[0].shape[1]
    total = torch.zeros(width, width, dtype=torch.double)
    for sample in samples:
        covariance = sample.double().cpu().t() @ sample.double().cpu()
        total += covariance / covariance.trace().clamp_min(1e-12) / len(samples)
    floor = VARIANCE_FLOOR / width * torch.eye(width, dtype=torch.double)
    return (inverse_sqrt(total + floor) / width**0.5).float()


def _tokenize_windows(tokenizer: Any, prose: Sequence[str], length: int) -> list[list[int]]:
    """Windows of prose of so many tokens, from as many documents as there are."""
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
    """Prose in which everybody has the same name."""
    return NAME_PATTERN.sub(name, text)
