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
# Of a `RelationMatcher`, as stores and packs hold them.
TENSORS = ("mean", "metric", "center", "bank_states", "weights", "quantiles")
MIN_BANK_COSINE = 0.4  # with a phrasing of the bank, from which on a clause is English
INTERNATIONAL_WORDS = load_words("international_words")  # of English and of other languages
TEMPERATURE = 0.1  # of the softmax over relations
LAST_WORD_WEIGHT = 0.8  # of the word that the answer follows
# One in this many of the pairs that ask different things is fitted; there are very many.
NEGATIVE_STRIDE = 7
NUM_WEIGHTS = 5  # of four features and a bias
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


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute without the caller's autocast, so that it changes nothing that is stored or compared.

    As a decorator it makes a new context for each call: calls may nest, and threads overlap.
    """
    with torch.autocast("cpu", enabled=False):
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
    """Return the phrasings of common relations, with `SUBJECT` for the subject."""
    text = files("dmt").joinpath("assets", BANK_FILE).read_text(encoding="utf-8")
    bank: dict[str, list[str]] = json.loads(text)
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
        self.matrix = self.vectorize([clause.text for clause in self.clauses])
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

    def vectorize(self, texts: Sequence[str]) -> Tensor:
        """Return the weights `(texts, words)` of the words that are in the bank."""
        matrix = torch.zeros(len(texts), len(self._columns), dtype=torch.float32, device="cpu")
        for row, text in enumerate(texts):
            for word, weight in self.weigh(text).items():
                if word in self._columns:
                    matrix[row, self._columns[word]] = weight
        return matrix


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
        states: `(n, width)` hidden states after them, at unit length.
        word_shares: `(n, relations)` how likely each relation is by the words.
        state_shares: `(n, relations)` how likely by the states.
    """

    texts: Sequence[str]
    states: Tensor
    word_shares: Tensor
    state_shares: Tensor


@dataclass(frozen=True)
class RelationMatcher:
    """Compares what clauses ask, calibrated for one layer of one model.

    Attributes:
        mean: `(width,)` mean hidden state of prose.
        metric: `(width, width)`; a state `x` is compared as `(x - mean) @ metric`.
        center: `(width,)` mean of the phrasings of the bank in the metric.
        bank_states: `(phrasings, width)` of the bank, as `embed` returns them.
        weights: `(2, 5)` weights of the four features and a bias: of the features of the two
            clauses alone, and with those that go through the bank.
        quantiles: `(2, rates)` scores that a share `RATES` of pairs that ask different things
            exceed.
        paraphrase_recall: share of pairs of phrasings of one relation that are recognized at a rate
            of .01, where the phrasing is not in the bank.
    """

    mean: Tensor
    metric: Tensor
    center: Tensor
    bank_states: Tensor
    weights: Tensor
    quantiles: Tensor
    paraphrase_recall: float = 0.0

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> RelationMatcher:
        """Create an instance from its tensors by name.

        Raises:
            UserError: they are of another bank.
        """
        mean, metric, center, bank_states, weights, quantiles = (tensors[name] for name in TENSORS)
        matcher = cls(mean, metric, center, bank_states, weights, quantiles)
        if len(matcher.bank_states) != len(list_bank_clauses()):
            raise UserError(
                "these facts were calibrated by another version of dmt; dmt memory rebind writes "
                "them for this one"
            )
        return matcher

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {name: getattr(self, name) for name in TENSORS}

    @full_precision()
    def embed(self, hidden: Tensor) -> Tensor:
        """Return hidden states `(n, width)` in the metric, centered, at unit length."""
        unit = F.normalize((hidden.float().cpu() - self.mean) @ self.metric, dim=-1)
        return F.normalize(unit - self.center, dim=-1)

    @full_precision()
    def describe(self, texts: Sequence[str], hidden: Tensor) -> ClauseFeatures:
        """Compute the features of clauses.

        Args:
            texts: with `SUBJECT` for the subject.
            hidden: `(texts, width)` hidden states after them.
        """
        states = self.embed(hidden)
        return ClauseFeatures(
            texts,
            states,
            self.share_by_words(texts),
            self._share(states @ self.bank_states.t()),
        )

    def share_by_words(self, texts: Sequence[str]) -> Tensor:
        """Return how likely each relation is by the words of clauses `(texts, relations)`."""
        words = get_word_weights()
        return self._share(words.vectorize(texts) @ words.matrix.t())

    def _share(self, cosines: Tensor, excluded: Tensor | None = None) -> Tensor:
        """Turn cosines with phrasings `(n, phrasings)` into shares of relations."""
        if excluded is not None:
            cosines = cosines.masked_fill(excluded, -1.0)
        relations = get_word_weights().relations
        best = cosines.new_full((len(cosines), int(relations.max()) + 1), -1.0)
        best = best.scatter_reduce(1, relations.expand(len(cosines), -1), cosines, "amax")
        return (best / TEMPERATURE).softmax(1)

    @full_precision()
    def compute_rarity(self, first: ClauseFeatures, second: ClauseFeatures) -> Tensor:
        """Compute how rare a match as good is between clauses that ask different things.

        Returns:
            Decades `(first, second)`: 2 where one in a hundred pairs scores higher.
        """
        return self._to_rarity(stack_features(first, second))

    @full_precision()
    def bound_rarity(self, texts: Sequence[str], others: Sequence[str]) -> Tensor:
        """Return the highest rarity `(texts, others)` that any hidden states could give."""
        words = compute_word_cosines(texts, others)
        shares = self.share_by_words(texts) @ self.share_by_words(others).t()
        features = torch.stack(
            [
                words,
                torch.ones_like(words),
                shares.clamp_min(MIN_SHARE).log(),
                torch.zeros_like(words),
            ],
            dim=-1,
        )
        return self._to_rarity(features)

    def _to_rarity(self, features: Tensor) -> Tensor:
        """Compute rarities from features `(..., 4)`: the greater of both scores'."""
        scores = features @ self.weights[:, :4].t() + self.weights[:, 4]
        rates = scores.new_tensor([-math.log10(rate) for rate in RATES])
        rarities = []
        for score, quantiles in zip(scores.unbind(-1), self.quantiles, strict=True):
            index = torch.searchsorted(-quantiles, -score.contiguous()).clamp(max=len(RATES) - 1)
            # Beyond the rarest pairs the score itself goes on.
            excess = (score - quantiles[0]).clamp_min(0)
            rarities.append(rates[index] + excess)
        return torch.stack(rarities).amax(0)


def fit_matcher(
    prose: Tensor,
    bank: Tensor,
    prefixes: Sequence[tuple[str, int]],
    prefix_states: Tensor,
) -> RelationMatcher:
    """Fit a matcher to the states of prose and of the bank.

    Args:
        prose: `(n, width)` hidden states of prose.
        bank: `(phrasings, width)` after each phrasing of the bank.
        prefixes: phrasings that are not complete, where no answer follows, and the index of the
            whole phrasing.
        prefix_states: `(prefixes, width)`.

    Source: ours. The weights are a logistic regression on pairs of phrasings; a phrasing is left
        out of the bank for its own pairs.
    """
    words = get_word_weights()
    relations = words.relations
    texts = [clause.text for clause in words.clauses]
    mean = prose.float().cpu().mean(0)
    centered = prose.float().cpu() - mean
    norms = centered.norm(dim=-1)
    # Real models have tokens with enormous states, which would dominate the covariance.
    centered = centered[norms < 20 * norms.median()]
    bank = bank.float().cpu()
    sums = torch.zeros(int(relations.max()) + 1, bank.shape[1]).index_add(0, relations, bank)
    deviations = bank - (sums / relations.bincount().unsqueeze(1))[relations]
    metric = compute_whitening([centered, deviations])
    unit = F.normalize((bank - mean) @ metric, dim=-1)
    center = unit.mean(0)
    matcher = RelationMatcher(
        mean,
        metric,
        center,
        F.normalize(unit - center, dim=-1),
        torch.zeros(2, NUM_WEIGHTS),
        torch.zeros(2, len(RATES)),
    )
    own = torch.eye(len(texts), dtype=torch.bool)
    state_cosines = matcher.bank_states @ matcher.bank_states.t()
    bank_features = ClauseFeatures(
        texts,
        matcher.bank_states,
        matcher._share(words.matrix @ words.matrix.t(), own),
        matcher._share(state_cosines, own),
    )
    prefix_texts = [text for text, _ in prefixes]
    owners = torch.tensor([index for _, index in prefixes], dtype=torch.long)
    embedded = matcher.embed(prefix_states)
    prefix_features = ClauseFeatures(
        prefix_texts,
        embedded,
        matcher._share(words.vectorize(prefix_texts) @ words.matrix.t(), own[owners]),
        matcher._share(embedded @ matcher.bank_states.t(), own[owners]),
    )
    pair_features = stack_features(bank_features, bank_features)
    is_same = relations.unsqueeze(0) == relations.unsqueeze(1)
    positives, negatives = pair_features[is_same & ~own], pair_features[~is_same]
    prefix_pairs = stack_features(prefix_features, bank_features)
    prefix_negatives = prefix_pairs[relations[owners].unsqueeze(1) == relations.unsqueeze(0)]
    all_prefix_pairs = prefix_pairs[relations[owners].unsqueeze(1) != relations.unsqueeze(0)]
    different = torch.cat([negatives, all_prefix_pairs])[::NEGATIVE_STRIDE]
    weights, quantiles = [], []
    for columns in ([0, 1], [0, 1, 2, 3]):
        weight = _fit_logistic(
            [positives[:, columns]],
            [negatives[::NEGATIVE_STRIDE, columns], prefix_negatives[:, columns]],
        )
        full = torch.zeros(NUM_WEIGHTS)
        full[columns], full[4] = weight[:-1], weight[-1]
        weights.append(full)
        scores = (different @ full[:4] + full[4]).sort(descending=True).values
        quantiles.append(
            torch.stack([scores[min(len(scores) - 1, int(rate * len(scores)))] for rate in RATES])
        )
    fitted = replace(matcher, weights=torch.stack(weights), quantiles=torch.stack(quantiles))
    recall = (fitted._to_rarity(positives) >= 2).float().mean()
    return replace(fitted, paraphrase_recall=float(recall))


def stack_features(first: ClauseFeatures, second: ClauseFeatures) -> Tensor:
    """Return the four features of pairs of clauses `(first, second, 4)`."""
    return torch.stack(
        [
            compute_word_cosines(first.texts, second.texts),
            first.states @ second.states.t(),
            (first.word_shares @ second.word_shares.t()).clamp_min(MIN_SHARE).log(),
            (first.state_shares @ second.state_shares.t()).clamp_min(MIN_SHARE).log(),
        ],
        dim=-1,
    )


def _fit_logistic(positives: Sequence[Tensor], negatives: Sequence[Tensor]) -> Tensor:
    """Return weights and bias that tell positives from negatives; groups count equally."""
    groups = [(group.double(), 1.0) for group in positives if len(group)]
    groups += [(group.double(), -1.0) for group in negatives if len(group)]
    num_features = groups[0][0].shape[1]
    weight = torch.zeros(num_features + 1, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def compute_loss() -> Tensor:
        optimizer.zero_grad()
        losses = [
            F.softplus(-sign * (group @ weight[:-1] + weight[-1])).mean() for group, sign in groups
        ]
        loss: Tensor = torch.stack(losses).sum() + 1e-3 * weight[:-1].square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(compute_loss)  # type: ignore[arg-type]
    return weight.detach().float()


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
    if float((words.vectorize([clause]) @ words.matrix.t()).max()) >= MIN_BANK_COSINE:
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
    cosines = (words.vectorize([prompt.clause]) @ words.matrix.t())[0]
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
