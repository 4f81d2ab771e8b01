"""What clauses ask: the bank of relations, and how near two clauses are."""

import json
from collections import Counter
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import WIDTH

from dmt.errors import UserError
from dmt.matching.questions import Question, find_question
from dmt.matching.relations import (
    BANK_FILE,
    MIXED,
    RATES,
    TEMPERATURE,
    RelationMatcher,
    StateSamples,
    _fit_logistic,
    asks_for_same_subject,
    compute_word_cosines,
    count_words,
    fit_matcher,
    get_word_weights,
    list_bank_clauses,
    load_bank,
    may_ask_the_same,
    names_same_things,
    share_relations,
)

CLAUSES = [clause.text for clause in list_bank_clauses()]
PREFIXES = [
    (" ".join(text.split()[:-1]), index)
    for index, text in enumerate(CLAUSES)
    if len(text.split()) > 3 and text.startswith("{s}")
]


def fit():
    """Fit a matcher to states that say a little about the relation."""
    generator = torch.Generator().manual_seed(0)
    relations = list(load_bank())
    directions = torch.randn(len(relations), WIDTH, generator=generator)
    noise = torch.randn(len(CLAUSES), WIDTH, generator=generator)
    bank = noise + torch.stack(
        [directions[relations.index(clause.relation)] for clause in list_bank_clauses()]
    )
    prefixes = torch.randn(len(PREFIXES), WIDTH, generator=generator)
    prose = torch.randn(200, WIDTH, generator=generator)
    return fit_matcher(PREFIXES, StateSamples(prose, bank, prefixes))


@pytest.fixture(scope="module")
def matcher():
    return fit()


# The bank.


def test_every_phrasing_of_the_bank_has_a_subject_and_belongs_to_one_relation():
    bank = load_bank()
    assert len(bank) >= 50
    assert [name for name, texts in bank.items() if len(texts) < 2 and name != texts[0]] == []
    assert [text for text in CLAUSES if "{s}" not in text or not text.split("{s}")[-1]] == []
    assert [text for text in CLAUSES if text != " ".join(text.split())] == []
    counts = Counter(text.casefold() for text in CLAUSES)
    assert [text for text, count in counts.items() if count > 1] == []


def test_phrasings_of_the_bank_are_read_as_questions_about_their_subject():
    unread = []
    for text in CLAUSES:
        question = find_question(text.replace("{s}", "Mira Castellan"), {"mira castellan"}, 2)
        if question is None or question.is_negated:
            unread.append(text)
    assert len(unread) <= 0.01 * len(CLAUSES), unread


def test_phrasings_of_groups_that_ask_different_things_are_relations_of_their_own():
    bank, groups = (
        load_bank(),
        json.loads(files("dmt").joinpath("assets", BANK_FILE).read_text(encoding="utf-8")),
    )
    assert set(groups) >= MIXED
    for name, texts in groups.items():
        expected = {text: [text] for text in texts} if name in MIXED else {name: texts}
        assert {key: bank.get(key) for key in expected} == expected


# The words of a clause.


def test_inflected_words_count_as_one():
    words = [set(count_words(text)) for text in ("she marries", "she married", "a marriage to")]
    assert words[0] & words[1]
    assert count_words("{s} was born in")["birth"] == count_words("{s}'s birth")["birth"] == 1
    assert count_words("{s} was born in")["$in"] == 1
    assert not count_words("{s}")


def test_cosines_of_words_are_those_of_their_weights():
    cosines = compute_word_cosines(CLAUSES[:20], CLAUSES[:20])
    torch.testing.assert_close(cosines, cosines.t())
    torch.testing.assert_close(cosines.diagonal(), torch.ones(20))
    assert (cosines >= 0).all()
    unknown = compute_word_cosines(["{s} florbs a"], ["{s} florbs a", "{s} was born in"])
    torch.testing.assert_close(unknown, torch.tensor([[1.0, 0.0]]))


# The matcher.


def test_a_clause_matches_itself_beyond_every_threshold(matcher):
    states = torch.randn(len(CLAUSES), WIDTH)
    features = matcher.describe(CLAUSES, states)
    assert (
        matcher.compute_rarity(features, features).diagonal() >= -torch.tensor(RATES).log10()[0]
    ).all()


def test_other_relations_match_rarely_and_phrasings_of_one_often(matcher):
    assert matcher.paraphrase_recall > 0.5
    features = matcher.describe(
        ["{s} was born in", "{s}'s place of birth is", "{s} works as a"],
        matcher.space.mean.expand(3, -1),
    )
    rarity = matcher.compute_rarity(features, features)
    assert rarity[0, 1] > rarity[0, 2]


def test_a_higher_score_is_rarer(matcher):
    assert (matcher.quantiles.diff(dim=1) <= 0).all(), "the rarest first"
    assert all(first < second for first, second in pairwise(RATES))
    assert (matcher.weights[:, :-1] >= 0).all(), "words and states that agree speak for a match"
    features = torch.zeros(50, 3)
    features[:, :2] = torch.linspace(-1, 1, 50).unsqueeze(1)
    features[:, 2] = torch.linspace(-9.2, 0, 50)
    rarities = matcher._to_rarity(features)
    assert (rarities.diff() >= 0).all()
    assert rarities[0] < 1
    assert rarities[-1] > 4


def test_rarities_lie_between_those_of_the_quantiles(matcher):
    rates = -torch.tensor(RATES).log10()
    alone = replace(matcher, weights=matcher.weights[:1], quantiles=matcher.quantiles[:1])
    weights, quantiles = alone.weights[0], alone.quantiles[0]
    column = int(weights[:-1].argmax())
    scores = torch.linspace(float(quantiles[-1]) - 1, float(quantiles[0]) + 1, 40)
    features = torch.zeros(40, len(weights) - 1)
    features[:, column] = (scores - weights[-1]) / weights[column]
    expected = np.interp(scores, quantiles.flip(0), rates.flip(0))
    expected += (scores - quantiles[0]).clamp_min(0).numpy()
    np.testing.assert_allclose(alone._to_rarity(features), expected, atol=1e-3)


def test_a_feature_that_speaks_against_a_match_counts_for_nothing():
    positives, negatives = torch.randn(200, 2), torch.randn(200, 2)
    positives[:, 0] += 2
    positives[:, 1] -= 2
    weights = _fit_logistic(positives, negatives)
    assert weights[0] > 0.5
    assert 0 <= weights[1] < 1e-3


def test_the_beginning_of_a_clause_matches_nothing_but_itself():
    """States say here, in their first number, whether an answer follows."""
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(len(CLAUSES), WIDTH, generator=generator)
    prefixes = torch.randn(len(PREFIXES), WIDTH, generator=generator)
    bank[:, 0], prefixes[:, 0] = 3, -3
    prose = torch.randn(200, WIDTH, generator=generator)
    matcher = fit_matcher(PREFIXES, StateSamples(prose, bank, prefixes))
    index, clause = next((index, CLAUSES[index]) for _, index in PREFIXES)
    facts = matcher.describe([clause], bank[index : index + 1])
    states = bank[index].repeat(3, 1)
    states[0, 0] = -3
    questions = matcher.describe([f"{clause} near", f"{clause} near", clause], states)
    rarities = matcher.compute_rarity(questions, facts)[:, 0]
    assert rarities[0] == 0
    assert (rarities[1:] > 2).all()


def test_shares_are_the_product_of_those_of_words_and_states(matcher):
    texts = CLAUSES[:50:9]
    states = matcher.space.embed(torch.randn(len(texts), WIDTH))
    words = get_word_weights()
    expected = []
    for text, state in zip(texts, states, strict=True):
        by_words = compute_word_cosines([text], CLAUSES)[0]
        by_states = matcher.space.bank_states @ state
        logits = [
            (by_words[words.relations == index].max() + by_states[words.relations == index].max())
            / TEMPERATURE
            for index in range(len(load_bank()))
        ]
        expected.append(torch.stack(logits).softmax(0))
    torch.testing.assert_close(
        share_relations(texts, states, matcher.space.bank_states), torch.stack(expected)
    )


def test_fitting_is_deterministic(matcher):
    again = fit()
    for name, tensor in matcher.tensors.items():
        assert torch.equal(tensor, again.tensors[name]), name
        assert tensor.isfinite().all()
    assert again.paraphrase_recall == matcher.paraphrase_recall


def test_a_matcher_is_rebuilt_from_its_tensors(matcher):
    rebuilt = RelationMatcher.from_tensors(matcher.tensors)
    features = matcher.describe(CLAUSES[:5], torch.eye(5, WIDTH))
    assert torch.equal(
        rebuilt.compute_rarity(features, features), matcher.compute_rarity(features, features)
    )


@pytest.mark.parametrize("name", ["bank_states", "weights", "quantiles", "completion", "gate"])
def test_a_matcher_of_another_version_is_refused(matcher, name):
    others = {key: tensor for key, tensor in matcher.tensors.items() if key != name}
    for tensors in (others, others | {name: matcher.tensors[name][:-1]}):
        with pytest.raises(UserError, match="another version of dmt; dmt memory rebind") as raised:
            RelationMatcher.from_tensors(tensors)
        assert "\n" not in str(raised.value)


# Whom two questions are about.


def ask(text):
    question = find_question(text, {"mira castellan"}, 2)
    assert question is not None
    return question


@pytest.mark.parametrize(
    ("text", "prompt", "is_same"),
    [
        ("Mira Castellan was born in", "The birthplace of Mira Castellan is", True),
        ("Mira Castellan was not born in", "Mira Castellan was born in", False),
        ("Mira Castellan's brother was born in", "Mira Castellan was born in", False),
        ("Mira Castellan's brother lives in", "Mira Castellan's brother works in", True),
        ("Mira Castellan's brother lives in", "Mira Castellan's sister lives in", False),
        ("The house of Mira Castellan stands in", "Mira Castellan lives in", True),
        ("The house of Mira Castellan stands in", "Mira Castellan speaks", False),
    ],
)
def test_a_relative_and_a_negation_are_another_subject(text, prompt, is_same):
    assert asks_for_same_subject(ask(text), ask(prompt)) == is_same
    assert asks_for_same_subject(ask(prompt), ask(text)) == is_same


def test_equal_relatives_are_one_subject():
    brother = Question("mira", "{s}'s brother is", "brother", True, False)
    assert asks_for_same_subject(brother, brother)


@pytest.mark.parametrize(
    ("prompt", "clause", "is_same"),
    [
        ("The capital of France is", "What is the capital of France? It is", True),
        ("The capital of France is", "The capital of Spain is", False),
        ("The zork of the glimmer is", "the glimmer has a zork in", True),
        ("The zork of the glimmer is", "the glimmer is", False),
        ("was born in", "a birth is in", True),
        ("was born in", "is working in", False),
    ],
)
def test_clauses_without_a_subject_name_the_same_things(prompt, clause, is_same):
    assert names_same_things(prompt, clause) == is_same


@pytest.mark.parametrize(
    ("prompt", "text", "may_match"),
    [
        ("Mira Castellan nació en", "Mira Castellan murió en", False),
        ("Mira Castellan nació en", "Mira Castellan nació", False),
        ("Mira Castellan nació en", "Mira Castellan nació en 1920 en", True),
        ("Mira Castellan wohnt in", "Mira Castellan arbeitet in", False),
        ("Mira Castellan の住所は", "Mira Castellan の電話番号は", False),
        ("Mira Castellan の住所は", "Mira Castellan の今の住所は", True),
        ("Mira Castellan lives in", "Mira Castellan resides near", True),
        ("Mira Castellan was born in", "Mira Castellan’s hometown is", True),
        ("Mira Castellan lives in", "Mira Castellan's brother lives in", False),
        ("Mira Castellan is an invention of", "Mira Castellan was devised by", True),
        ("Mira Castellan mag gern", "Mira Castellan mag gern", True),
        ("Mira Castellan is geboren in", "Mira Castellan is overleden in", False),
        ("Mira Castellan est né à", "Mira Castellan est mort à", False),
        ("Mira Castellan come siempre pan con", "Mira Castellan bebe siempre vino con", False),
    ],
)
def test_a_language_that_the_bank_has_not_needs_the_words_of_the_prompt(prompt, text, may_match):
    assert may_ask_the_same(ask(text), ask(prompt)) == may_match


def test_the_callers_precision_and_device_change_no_rarity(matcher):
    texts = CLAUSES[:40:8]
    hidden = torch.randn(len(texts), WIDTH, generator=torch.Generator().manual_seed(1))

    def compute():
        features = matcher.describe(texts, hidden)
        return matcher.compute_rarity(features, features)

    expected = compute()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compute(), expected)
        assert torch.is_autocast_enabled("cpu"), "calls that nest restore the caller's autocast"
    with torch.device("meta"):
        assert torch.equal(compute(), expected)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(compute(), expected)
    finally:
        torch.set_default_dtype(torch.float32)
