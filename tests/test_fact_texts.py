"""The texts of `benchmarks/facts_in_text.py` ask about whom they claim, in words of their own."""

import random
import re
import sys
from pathlib import Path

import pytest

from dmt.data.synthetic import PHRASINGS, RELATIONS
from dmt.matching.relations import load_bank

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import counterfactuals
import fact_texts
from fact_texts import NAME_PARTS, NEW_PHRASINGS, make_fact, make_subjects


def normalize(phrasing):
    text = phrasing.split("|")[0].replace("{name}", "{s}").replace("{Their}", "{s}'s")
    return re.sub(r"\W+", " ", text).strip().casefold()


def test_new_phrasings_are_in_no_training_text_or_calibration_prompt():
    written = PHRASINGS | counterfactuals.PHRASINGS | fact_texts.THING_PHRASINGS
    training_texts = {
        normalize(text) for texts in (*written.values(), *load_bank().values()) for text in texts
    }
    assert set(NEW_PHRASINGS) == set(written)
    for phrasings in NEW_PHRASINGS.values():
        assert len({normalize(text) for text in phrasings}) == len(phrasings) >= 10
    new = [*fact_texts.UNSTORED_QUESTIONS, *(t for texts in NEW_PHRASINGS.values() for t in texts)]
    for phrasing in new:
        assert phrasing.count("{s}") == 1, phrasing
        assert normalize(phrasing) not in training_texts, phrasing


def test_names_are_distinct_and_of_every_kind():
    subjects = make_subjects(60, seed=0)
    assert len({subject.name for subject in subjects}) == 60
    assert {subject.kind for subject in subjects} == set(NAME_PARTS)
    assert set(subjects[0].answers) == set(RELATIONS)
    assert [s.name for s in make_subjects(60, seed=1)] != [s.name for s in subjects]
    with pytest.raises(ValueError, match=r"count must be at most [\d,]+ names, got 100,000"):
        fact_texts.make_names(100_000, random.Random(0))


def test_texts_about_two_people_ask_about_the_one_they_claim():
    phrasing, statement = "Where was {s} born? In", "{s} was born in the town of"
    cases = list(fact_texts.make_pair_cases("Asked", "Other", phrasing, statement, " Foxford"))
    names = (*fact_texts.PAIR_NAMES, *fact_texts.PAIR_BEGINNINGS)
    assert len(cases) == len(fact_texts.PAIR_TEXTS) + len(names)
    for case in cases:
        assert case.target_name == "Asked"
        assert "Other" in case.prompt
        if case.shape in names:  # the subject of the sentence: its first words or its last ones
            subject = case.prompt.removesuffix(" was born in the town of")
            assert subject != case.prompt
            assert subject.startswith("Asked") != subject.endswith("Asked")
        else:
            assert case.prompt.endswith("Where was Asked born? In")
            assert case.prompt.count("Other") == 1


def test_other_names_are_nobody_elses():
    for subject in make_subjects(60, seed=0):
        longer = fact_texts.make_longer_names(subject.name, subject.kind)
        assert all(subject.name in name != subject.name for name in longer)
        for name in fact_texts.make_related_names(subject.name, subject.kind):
            assert subject.name not in name


def test_relatives_negations_and_clauses_are_not_about_the_subject():
    subject = make_subjects(1, seed=0)[0]
    for relation in RELATIONS:
        fact = make_fact(subject, relation, fact_texts.list_trained_phrasings(relation)[0])
        cases = [
            *fact_texts.make_relative_cases(fact, fact_texts.list_trained_phrasings(relation)[1]),
            *fact_texts.make_negation_cases(fact),
            *fact_texts.make_clause_cases(fact),
        ]
        assert len(cases) >= 15
        for case in cases:
            assert case.target_name != subject.name
            assert case.answer == subject.answers[relation]
            assert subject.name in case.prompt
            assert not case.prompt.endswith(fact.prompt)


def test_prose_gets_the_names():
    text = "He met the great George Washington there. We agree. " * 40
    named = fact_texts.substitute_names(text, ["Rose", "王小明"], random.Random(0))
    assert "Washington" not in named
    assert named.count("Rose") + named.count("王小明") > 40


def test_sentences_and_chat_turns():
    document = "One is here. This sentence is long enough for us. Is it? It is too long " + "x" * 99
    assert fact_texts.split_sentences([document + ". End."], 60) == [
        "This sentence is long enough for us."
    ]
    assert fact_texts.make_chat_turns("Where was Ada born? In", "Ada") == (
        "Where was Ada born?",
        "In",
    )
    assert fact_texts.make_chat_turns("Ada lives in", "Ada")[1] == "Ada lives in"
