"""The bank of relations is a general resource: it has no phrasing that measures it."""

import re
import sys
from pathlib import Path

from dmt.data.synthetic import RELATIONS
from dmt.matching.relations import count_words, get_word_weights, load_bank

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import fact_texts


def normalize(phrasing):
    return re.sub(r"\W+", " ", phrasing).strip().casefold()


def test_bank_has_no_phrasing_that_measures_it():
    bank = {normalize(text) for texts in load_bank().values() for text in texts}
    measured = [
        *fact_texts.UNSTORED_QUESTIONS,
        *(text for texts in fact_texts.NEW_PHRASINGS.values() for text in texts),
        *(text for name in RELATIONS for text in fact_texts.list_held_out_phrasings(name)),
    ]
    assert [text for text in measured if normalize(text) in bank] == []


def test_phrasings_of_the_bank_are_distinct_and_have_one_subject():
    texts = [text for texts in load_bank().values() for text in texts]
    assert len({normalize(text) for text in texts}) == len(texts)
    assert [text for text in texts if text.count("{s}") not in (1, 2)] == []


def test_words_of_two_words_share_stems_with_both():
    assert count_words("{s}'s birthday is")["birth"] == 1
    assert count_words("The day on which {s} was born is")["birth"] == 1
    assert set(count_words("{s}'s hometown:")) >= {"hom", "town"}


def test_last_word_that_no_phrasing_ends_in_has_no_weight():
    weights = get_word_weights()
    assert "$xylophone" not in weights.weigh("{s} lives beside a xylophone")
    assert "$on" in weights.weigh("{s} was born on")
