"""What a clause asks: relations, and how near two clauses are in what they ask.

A bank of common relations, each in several phrasings, calibrates a model once. Two clauses are
compared by their words, by the model's hidden states after them, and by the relations of the bank
that either is near to. So a phrasing that no one wrote is recognized by those that it resembles.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.resources import files

import torch
import torch.nn.functional as F
from torch import Tensor

from dmt.errors import UserError
from dmt.matching.mentions import SENTENCE_STARTERS, load_words
from dmt.matching.questions import SUBJECT, Question
from dmt.ops import inverse_sqrt
from dmt.text import UNSPACED

BANK_FILE = "relations.json"
# Groups of the file whose phrasings ask different things.
MIXED = frozenset(
    {
        "action",
        "date of an act",
        "place of an act",
        "victim",
        "opinion",
        "mood",
        "wish",
        "means",
        "duration",
        "appointment",
        "illness date",
    }
)
# Tensors of a `RelationMatcher`, as stores and packs hold them: of its space, and of its scores.
SPACE_TENSORS = ("mean", "metric", "center", "bank_states")
SCORE_TENSORS = ("weights", "quantiles", "completion", "gate")
# Features of a pair of clauses that each score is made of: with the share of one relation the
# cosine of the words or that of the states, and for relations that the bank does not have both.
SCORE_FEATURES = ((0, 2), (1, 2), (0, 1))
NUM_FEATURES = 3
MIN_BANK_COSINE = 0.4  # with a phrasing of the bank, from which on a clause is English
INTERNATIONAL_WORDS = load_words("international_words")  # of English and of other languages
TEMPERATURE = 0.1  # of the softmax over relations
LAST_WORD_WEIGHT = 0.8  # of the word that the answer follows
# One in this many of the pairs that ask different things is fitted; there are very many.
NEGATIVE_STRIDE = 7
GATE_RECALL = 0.93  # share of phrasings of a relation that count as complete
NUM_FOLDS = 4  # of relations, each without which completeness is fitted
MIN_SHARE = 1e-4  # that two clauses ask the same; keeps its logarithm finite
# Shares of negative pairs for which a threshold is stored.
RATES = tuple(10 ** (-4 + 0.05 * step) for step in range(75))
# Words that say nothing about a relation.
STOP_WORDS = load_words("stop_words")
# A letter of a script without spaces is a word.
LETTER = rf"(?:(?!{UNSPACED.pattern})[^\W_])"
WORD = re.compile(rf"{LETTER}+(?:-{LETTER}+)*|[^\W_]|[?:]")
# Words of two words: "birthday" shares the first with "birth" and the second with "on which day".
COMPOUND = re.compile(r"^(birth|home|work)(day|place|date|town|land|time)$")
IRREGULAR = {
    "born": "birth",
    "wed": "marry",
    "died": "death",
    "die": "death",
    "dead": "death",
    "wrote": "write",
    "written": "write",
    "spoke": "speak",
    "spoken": "speak",
    "grew": "grow",
    "built": "build",
    "made": "make",
    "paid": "pay",
    "taught": "teach",
    "won": "win",
    "held": "hold",
    "began": "begin",
    "got": "get",
    "came": "come",
    "living": "livelihood",
    "resides": "residence",
    "reside": "residence",
    "resident": "residence",
    "raised": "raise",
    "hired": "hire",
}


def list_tensor_shapes(width: int) -> dict[str, list[int]]:
    """Return the shapes of a matcher's tensors by name.

    Args:
        width: of the states.
    """
    return {
        "mean": [width],
        "metric": [width, width],
        "center": [width],
        "bank_states": [len(list_bank_clauses()), width],
        "weights": [len(SCORE_FEATURES), NUM_FEATURES + 1],  # and a bias
        "quantiles": [len(SCORE_FEATURES), len(RATES)],
        "completion": [width + 1],
        "gate": [3],
    }


@contextmanager
def on_cpu() -> Iterator[None]:
    """Compute on the CPU in full precision, whatever the caller's default device and autocast.

    So they change nothing that is stored or compared. As a decorator it makes a new context for
    each call: calls may nest, and threads overlap.
    """
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):
        yield


@dataclass(frozen=True)
class BankClause:
    """A phrasing of the bank.

    Attributes:
        text: with `SUBJECT` for the subject.
        relation: the relation of the bank that it is a phrasing of.
    """

    text: str
    relation: str


@cache
def load_bank() -> dict[str, list[str]]:
    """Return the phrasings of common relations, with `SUBJECT` for the subject.

    A phrasing of a mixed group is a relation of its own.
    """
    text = files("dmt").joinpath("assets", BANK_FILE).read_text(encoding="utf-8")
    bank: dict[str, list[str]] = {}
    for name, phrasings in json.loads(text).items():
        bank |= {text: [text] for text in phrasings} if name in MIXED else {name: phrasings}
    return bank


def list_bank_clauses() -> list[BankClause]:
    """List all phrasings of the bank."""
    return [BankClause(text, name) for name, texts in load_bank().items() for text in texts]


@cache
def _stem(word: str) -> str:
    word = IRREGULAR.get(word, word)
    for suffix in ("ing", "edly", "ies", "ied", "ed", "es", "s", "ers", "er", "ment", "y"):
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            word = word[: -len(suffix)]
            break
    return word.rstrip("e") or word


def count_words(text: str) -> Counter[str]:
    """Count the stems of the words that say what a clause asks; `$` marks its last word."""
    words = WORD.findall(text.replace(SUBJECT, " ").casefold())
    parts = [part for word in words for part in COMPOUND.sub(r"\1 \2", word).split()]
    counts = Counter(_stem(word) for word in parts if word not in STOP_WORDS and word not in "?:")
    if words:
        counts[f"${words[-1]}"] += 1
    return counts


class WordWeights:
    """Weights of words by how few relations of the bank use them."""

    def __init__(self) -> None:
        bank = load_bank()
        self.clauses = list_bank_clauses()
        relations_by_word = Counter(
            word
            for texts in bank.values()
            for word in {word for text in texts for word in count_words(text)}
        )
        self._size = 1 + len(bank)
        self._relations_by_word = relations_by_word
        self._columns = {word: column for column, word in enumerate(relations_by_word)}
        shape = len(self._columns), len(self.clauses)
        self._weights_by_word = torch.zeros(shape, dtype=torch.float32, device="cpu")
        for index, clause in enumerate(self.clauses):
            for word, weight in self.weigh(clause.text).items():
                self._weights_by_word[self._columns[word], index] = weight
        self._names = list(bank)
        #: `(phrasings,)` the relation of each.
        self.relations = torch.tensor(
            [self._names.index(clause.relation) for clause in self.clauses], device="cpu"
        )

    @property
    def known_words(self) -> Set[str]:
        """The stems that phrasings of the bank use."""
        return self._columns.keys()

    def weigh(self, text: str) -> dict[str, float]:
        """Return the weight of each word of a clause, at unit length."""
        weights = {
            word: (LAST_WORD_WEIGHT if word[0] == "$" else 1.0)
            * math.log(self._size / self._relations_by_word.get(word, 0.5))
            for word in count_words(text)
            # A last word that ends no phrasing of the bank says nothing of what follows it.
            if word[0] != "$" or word in self._relations_by_word
        }
        norm = math.sqrt(sum(weight * weight for weight in weights.values())) or 1.0
        return {word: weight / norm for word, weight in weights.items()}

    def compare(self, texts: Sequence[str]) -> Tensor:
        """Compute the cosines `(texts, phrasings)` of the words of clauses and of the bank's."""
        cosines = []
        for text in texts:
            weights = {
                self._columns[word]: weight
                for word, weight in self.weigh(text).items()
                if word in self._columns
            }
            # A clause has few of the words.
            values = self._weights_by_word.new_tensor(list(weights.values()))
            cosines.append(values @ self._weights_by_word[list(weights)])
        return torch.stack(cosines)


@cache
def list_relation_words(relation: str) -> frozenset[str]:
    """Return the stems that the phrasings of a relation of the bank use."""
    return frozenset(word for text in load_bank()[relation] for word in count_words(text))


@cache
def get_word_weights() -> WordWeights:
    """Return the weights of the bank's words."""
    return WordWeights()


def compute_word_cosines(first: Sequence[str], second: Sequence[str]) -> Tensor:
    """Compute the cosines `(first, second)` of the words of clauses, other words included."""
    weights = get_word_weights()
    columns: dict[str, int] = {}
    matrices = []
    weighed = [[weights.weigh(text) for text in texts] for texts in (first, second)]
    for word in (word for texts in weighed for text in texts for word in text):
        columns.setdefault(word, len(columns))
    for texts in weighed:
        matrix = torch.zeros(len(texts), len(columns), dtype=torch.float32, device="cpu")
        for row, text in enumerate(texts):
            for word, weight in text.items():
                matrix[row, columns[word]] = weight
        matrices.append(matrix)
    return matrices[0] @ matrices[1].t()


@dataclass(frozen=True)
class ClauseFeatures:
    """What clauses are compared by, on the CPU.

    Attributes:
        texts: of `n` clauses.
        states: `(n, width)` states after them, as `StateSpace.embed` returns them.
        relation_shares: `(n, relations)` how likely each relation of the bank is.
        completeness: `(n,)` log-odds that an answer follows, by the states.
    """

    texts: Sequence[str]
    states: Tensor
    relation_shares: Tensor
    completeness: Tensor


@dataclass(frozen=True)
class StateSamples:
    """States to which a space is fitted.

    Attributes:
        prose: `(n, width)` of prose.
        bank: `(phrasings, width)` after each phrasing of the bank.
        prefixes: `(prefixes, width)` after phrasings that are not complete.
    """

    prose: Tensor
    bank: Tensor
    prefixes: Tensor


@dataclass(frozen=True)
class StateSpace:
    """The space in which the states of clauses are compared.

    Attributes:
        mean: `(width,)` mean state of prose.
        metric: `(width, width)`; a state `x` is compared as `(x - mean) @ metric`.
        center: `(width,)` mean of the phrasings of the bank in the metric.
        bank_states: `(phrasings, width)` of the bank, as `embed` returns them.
    """

    mean: Tensor
    metric: Tensor
    center: Tensor
    bank_states: Tensor

    @on_cpu()
    def embed(self, hidden: Tensor) -> Tensor:
        """Return states `(n, width)` in the metric, centered, at unit length."""
        unit = F.normalize((hidden.float().cpu() - self.mean) @ self.metric, dim=-1)
        return F.normalize(unit - self.center, dim=-1)


@dataclass(frozen=True)
class RelationMatcher:
    """Compares what clauses ask by their words and by the hidden states after them.

    Words and states each say how likely each relation of the bank is. The product of these shares
    decides, together with how near the words or the states of two clauses are; for relations that
    the bank does not have, words and states alone.

    Attributes:
        space: of the hidden states of one layer of one model.
        weights: `(scores, features + 1)` of the features of `stack_features`, and a bias; 0 for
            those that are not among a score's `SCORE_FEATURES`.
        quantiles: `(scores, rates)` scores that a share `RATES` of pairs that ask different things
            exceed.
        completion: `(width + 1,)` weights of a state, and a bias, for the log-odds that an answer
            follows.
        gate: `(3,)` weights of the cosine of the states and of the completeness of the first
            clause, and a bias; below 0 the first clause is not complete.
        paraphrase_recall: share of pairs of phrasings of one relation that are recognized at a rate
            of .01, where the phrasing is not in the bank.
    """

    space: StateSpace
    weights: Tensor
    quantiles: Tensor
    completion: Tensor
    gate: Tensor
    paraphrase_recall: float = 0.0

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> RelationMatcher:
        """Create an instance from its tensors by name.

        Raises:
            UserError: they are of another version of dmt.
        """
        shapes = list_tensor_shapes(len(tensors["mean"]) if "mean" in tensors else 0)
        if {name: list(tensor.shape) for name, tensor in tensors.items()} != shapes:
            raise UserError(
                "these facts were calibrated by another version of dmt; dmt memory rebind writes "
                "them for this one"
            )
        mean, metric, center, bank_states = (tensors[name] for name in SPACE_TENSORS)
        weights, quantiles, completion, gate = (tensors[name] for name in SCORE_TENSORS)
        space = StateSpace(mean, metric, center, bank_states)
        return cls(space, weights, quantiles, completion, gate)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {name: getattr(self.space, name) for name in SPACE_TENSORS} | {
            name: getattr(self, name) for name in SCORE_TENSORS
        }

    @on_cpu()
    def describe(self, texts: Sequence[str], hidden: Tensor) -> ClauseFeatures:
        """Compute the features of clauses.

        Args:
            texts: with `SUBJECT` for the subject.
            hidden: `(texts, width)` hidden states after them.
        """
        states = self.space.embed(hidden)
        completeness = states @ self.completion[:-1] + self.completion[-1]
        shares = share_relations(texts, states, self.space.bank_states)
        return ClauseFeatures(texts, states, shares, completeness)

    @on_cpu()
    def compute_rarity(self, first: ClauseFeatures, second: ClauseFeatures) -> Tensor:
        """Compute how rare a match as good is between clauses that ask different things.

        Args:
            first: questions, which may not be complete; no answer follows "was born".
            second: prompts of facts.

        Returns:
            Decades `(first, second)`: 2 where one in a hundred pairs scores higher, 0 where the
            first clause is not complete.
        """
        is_complete = stack_completeness(first, second) @ self.gate[:-1] + self.gate[-1] >= 0
        is_complete |= torch.tensor(
            [[text == other for other in second.texts] for text in first.texts]
        )
        rarities = self._to_rarity(stack_features(first, second))
        return torch.where(is_complete, rarities, torch.zeros_like(rarities))

    def _to_rarity(self, features: Tensor) -> Tensor:
        """Compute rarities from features `(..., features)`: the greatest of all scores'."""
        scores = features @ self.weights[:, :-1].t() + self.weights[:, -1]
        rates = scores.new_tensor([-math.log10(rate) for rate in RATES])
        rarities = []
        for score, quantiles in zip(scores.unbind(-1), self.quantiles, strict=True):
            index = torch.searchsorted(-quantiles, -score.contiguous()).clamp(max=len(RATES) - 1)
            # Between two quantiles in proportion, beyond the rarest pairs as the score itself.
            rarer = (index - 1).clamp_min(0)
            step = (quantiles[rarer] - quantiles[index]).clamp_min(1e-6)
            share = ((score - quantiles[index]) / step).clamp(0, 1)
            excess = (score - quantiles[0]).clamp_min(0)
            rarities.append(rates[index] + share * (rates[rarer] - rates[index]) + excess)
        return torch.stack(rarities).amax(0)


@on_cpu()
def fit_matcher(prefixes: Sequence[tuple[str, int]], samples: StateSamples) -> RelationMatcher:
    """Fit a matcher to the states of prose and of the bank.

    Args:
        prefixes: phrasings that are not complete, where no answer follows, and the index of the
            whole phrasing.
        samples: hidden states of one layer.

    Source: ours. The product of shares is a product of experts (Hinton, 2002). The weights are
        logistic regressions on pairs of phrasings; a phrasing is left out of the bank for its own
        pairs.
    """
    words = get_word_weights()
    relations = words.relations
    texts = [clause.text for clause in words.clauses]
    prefix_texts = [text for text, _ in prefixes]
    owners = torch.tensor([index for _, index in prefixes], dtype=torch.long)
    space = _fit_space(samples, relations)
    bank_states, prefix_states = space.bank_states, space.embed(samples.prefixes)
    completion, completeness = _fit_completion(
        bank_states, prefix_states, relations, relations[owners]
    )
    own = torch.eye(len(texts), dtype=torch.bool)
    shares = share_relations(texts, bank_states, bank_states, own)
    prefix_shares = share_relations(prefix_texts, prefix_states, bank_states, own[owners])
    bank = ClauseFeatures(texts, bank_states, shares, completeness[: len(texts)])
    cut = ClauseFeatures(prefix_texts, prefix_states, prefix_shares, completeness[len(texts) :])
    is_same = relations.unsqueeze(0) == relations.unsqueeze(1)
    is_paraphrase = is_same & ~own
    is_own_relation = relations[owners].unsqueeze(1) == relations.unsqueeze(0)
    pairs, prefix_pairs = stack_features(bank, bank), stack_features(cut, bank)
    weights, quantiles = _fit_scores(
        pairs[is_paraphrase], pairs[~is_same], prefix_pairs[~is_own_relation]
    )
    gate = _fit_gate(
        stack_completeness(bank, bank)[is_paraphrase],
        stack_completeness(cut, bank)[is_own_relation],
    )
    matcher = RelationMatcher(space, weights, quantiles, completion, gate)
    is_recalled = matcher.compute_rarity(bank, bank)[is_paraphrase] >= 2
    return replace(matcher, paraphrase_recall=float(is_recalled.float().mean()))


def _fit_scores(paraphrases: Tensor, others: Tensor, cut_others: Tensor) -> tuple[Tensor, Tensor]:
    """Fit the scores, and how high those of pairs that ask different things are.

    Args:
        paraphrases: features of pairs that ask the same.
        others: of pairs that ask different things.
        cut_others: the same, where the first clause is not complete.

    Returns:
        Weights and quantiles of a `RelationMatcher`.
    """
    different = torch.cat([others, cut_others])[::NEGATIVE_STRIDE]
    ranks = [min(len(different) - 1, int(rate * len(different))) for rate in RATES]
    weights = torch.zeros(len(SCORE_FEATURES), NUM_FEATURES + 1)
    quantiles = []
    for index, features in enumerate(SCORE_FEATURES):
        columns = list(features)
        fitted = _fit_logistic(paraphrases[:, columns], others[::NEGATIVE_STRIDE][:, columns])
        weights[index, [*columns, -1]] = fitted
        scores = different[:, columns] @ fitted[:-1] + fitted[-1]
        quantiles.append(scores.sort(descending=True).values[ranks])
    return weights, torch.stack(quantiles)


def _fit_gate(complete: Tensor, cut: Tensor) -> Tensor:
    """Fit what tells complete clauses; a share `GATE_RECALL` of them passes.

    Args:
        complete: `stack_completeness` of pairs that ask the same.
        cut: of beginnings of clauses with whole clauses of their relation.
    """
    weights = _fit_logistic(complete, cut)[:-1]
    scores = (complete @ weights).sort().values
    return torch.cat([weights, -scores[int((1 - GATE_RECALL) * len(scores))].unsqueeze(0)])


def _fit_completion(
    states: Tensor, prefix_states: Tensor, relations: Tensor, prefix_relations: Tensor
) -> tuple[Tensor, Tensor]:
    """Fit how likely it is that an answer follows a clause.

    Args:
        states: `(phrasings, width)` of the bank.
        prefix_states: `(prefixes, width)` of phrasings that are not complete.
        relations: of the phrasings.
        prefix_relations: of the prefixes.

    Returns:
        Weights and bias `(width + 1,)`, and log-odds `(phrasings + prefixes,)`, each from weights
        that were fitted without its relation.
    """
    inputs = torch.cat([states, prefix_states])
    groups = torch.cat([relations, prefix_relations]) % NUM_FOLDS
    is_phrasing = torch.arange(len(inputs)) < len(states)
    completeness = torch.zeros(len(inputs))
    for fold in range(NUM_FOLDS):
        is_fitted = groups != fold
        weights = _fit_logistic(
            inputs[is_fitted & is_phrasing], inputs[is_fitted & ~is_phrasing], is_signed=True
        )
        completeness[~is_fitted] = inputs[~is_fitted] @ weights[:-1] + weights[-1]
    return _fit_logistic(states, prefix_states, is_signed=True), completeness


def _fit_space(samples: StateSamples, relations: Tensor) -> StateSpace:
    """Fit a space in which phrasings of one relation are near.

    Args:
        samples: the states.
        relations: of each phrasing of the bank.
    """
    mean = samples.prose.float().cpu().mean(0)
    centered = samples.prose.float().cpu() - mean
    norms = centered.norm(dim=-1)
    # Real models have tokens with enormous states, which would dominate the covariance.
    centered = centered[norms < 20 * norms.median()]
    bank = samples.bank.float().cpu()
    sums = torch.zeros(int(relations.max()) + 1, bank.shape[1]).index_add(0, relations, bank)
    deviations = bank - (sums / relations.bincount().unsqueeze(1))[relations]
    metric = compute_whitening([centered, deviations])
    unit = F.normalize((bank - mean) @ metric, dim=-1)
    center = unit.mean(0)
    return StateSpace(mean, metric, center, F.normalize(unit - center, dim=-1))


def share_relations(
    texts: Sequence[str], states: Tensor, bank_states: Tensor, excluded: Tensor | None = None
) -> Tensor:
    """Return how likely each relation of the bank is, by words and states `(texts, relations)`.

    Args:
        texts: of clauses.
        states: after them, as `StateSpace.embed` returns them.
        bank_states: of the bank.
        excluded: `(texts, phrasings)` whether a phrasing of the bank does not count.
    """
    words = get_word_weights()
    logits = states.new_zeros(len(texts), int(words.relations.max()) + 1)
    for cosines in (words.compare(texts), states @ bank_states.t()):
        if excluded is not None:
            cosines = cosines.masked_fill(excluded, -1.0)
        best = torch.full_like(logits, -1.0).scatter_reduce(
            1, words.relations.expand(len(texts), -1), cosines, "amax"
        )
        logits = logits + best / TEMPERATURE
    return logits.softmax(1)


def stack_features(first: ClauseFeatures, second: ClauseFeatures) -> Tensor:
    """Return the features of pairs of clauses `(first, second, features)`.

    They are the cosines of the words and of the states, and the logarithm of the share that both
    ask for the same relation.
    """
    shares = first.relation_shares @ second.relation_shares.t()
    return torch.stack(
        [
            compute_word_cosines(first.texts, second.texts),
            first.states @ second.states.t(),
            shares.clamp_min(MIN_SHARE).log(),
        ],
        dim=-1,
    )


def stack_completeness(first: ClauseFeatures, second: ClauseFeatures) -> Tensor:
    """Return what tells a complete clause from the beginning of one `(first, second, 2)`.

    They are the cosine of the states, and the completeness of the first clause.
    """
    cosines = first.states @ second.states.t()
    return torch.stack([cosines, first.completeness.unsqueeze(1).expand_as(cosines)], dim=-1)


def _fit_logistic(positives: Tensor, negatives: Tensor, is_signed: bool = False) -> Tensor:
    """Return weights and a bias that tell positives from negatives, which count equally.

    Args:
        positives: `(n, features)`.
        negatives: `(n, features)`.
        is_signed: whether weights may be below 0.
    """
    num_features = positives.shape[1]
    parameters = torch.zeros(num_features) if is_signed else torch.ones(num_features)
    parameters = parameters.double().requires_grad_()
    bias = torch.zeros(1, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters, bias], max_iter=100, line_search_fn="strong_wolfe")
    groups = ((positives.double(), 1.0), (negatives.double(), -1.0))

    def compute_loss() -> Tensor:
        optimizer.zero_grad()
        weights = parameters if is_signed else parameters.square()
        losses = [
            F.softplus(-sign * (group @ weights + bias)).mean()
            for group, sign in groups
            if len(group)
        ]
        loss: Tensor = torch.stack(losses).sum() + 1e-3 * weights.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(compute_loss)  # type: ignore[arg-type]
    weights = parameters.detach() if is_signed else parameters.detach().square()
    return torch.cat([weights, bias.detach()]).float()


def compute_whitening(samples: Sequence[Tensor], floor_share: float = 0.1) -> Tensor:
    """Compute the inverse root of the mean covariance of `samples`, each scaled to trace 1.

    Args:
        samples: centered, `(n, width)`.
        floor_share: added to the variance in every direction, as a share of the mean variance.
    """
    width = samples[0].shape[1]
    total = torch.zeros(width, width, dtype=torch.double)
    for sample in samples:
        sample = sample.cpu().double()
        covariance = sample.t() @ sample
        total += covariance / covariance.trace().clamp_min(1e-12) / len(samples)
    floor = floor_share / width * torch.eye(width, dtype=torch.double)
    return (inverse_sqrt(total + floor) / width**0.5).float()


def asks_for_same_subject(question: Question, prompt: Question) -> bool:
    """Check whether a question is about the same being or thing of its subject as a prompt.

    A thing of the subject, such as its house, counts as a phrasing of the relation where the words
    of the prompt's relation have it.

    Args:
        question: what a text asks.
        prompt: what a fact's own prompt asks.
    """
    if question.is_negated != prompt.is_negated:
        return False
    if question.relative == prompt.relative:
        return True
    for own, other in ((question, prompt), (prompt, question)):
        if own.relative and (own.is_certain_relative or not _is_word_of(own.relative, other)):
            return False
    return True


def may_ask_the_same(question: Question, prompt: Question) -> bool:
    """Check whether a question may ask what a prompt asks, before states are compared.

    States are calibrated with the bank, which is in English. Where a prompt is in another language,
    the question needs its words.

    Args:
        question: what a text asks.
        prompt: what a fact's own prompt asks.
    """
    return asks_for_same_subject(question, prompt) and (
        _is_english(prompt.clause) or names_same_things(prompt.clause, question.clause)
    )


@lru_cache(10_000)
def _is_english(clause: str) -> bool:
    """Check whether a clause resembles the bank, or at least half of its words are English.

    Words that other languages have too do not count.
    """
    words = get_word_weights()
    if float(words.compare([clause]).max()) >= MIN_BANK_COSINE:
        return True
    spelled = [
        word
        for word in WORD.findall(clause.replace(SUBJECT, " ").casefold())
        if word not in "?:" and word not in INTERNATIONAL_WORDS
    ]
    num_english = sum(
        word in SENTENCE_STARTERS or word in STOP_WORDS or _stem(word) in words.known_words
        for word in spelled
    )
    return num_english > 0 and 2 * num_english >= len(spelled)


def _is_word_of(noun: str, prompt: Question) -> bool:
    """Check whether phrasings of a prompt's relation use a noun."""
    stems = {stem for stem in count_words(noun) if stem[0] != "$"}
    words = get_word_weights()
    cosines = words.compare([prompt.clause])[0]
    relation_words = list_relation_words(words.clauses[int(cosines.argmax())].relation)
    return stems <= (relation_words | set(count_words(prompt.clause)))


def names_same_things(prompt: str, clause: str) -> bool:
    """Check whether a clause has all words of a prompt that no relation of the bank uses.

    Where the bank uses all of them, the clause needs them all.
    """
    bank_words = get_word_weights().known_words
    words = {word for word in count_words(prompt) if word[0] != "$"}
    things = {word for word in words if word not in bank_words} or words
    return things <= set(count_words(clause))
