"""Text as people write it."""

import unicodedata

import pytest

from dmt.text import fold_text, list_spellings

NAMES = [
    "Ada",
    "Olga Vance",
    "José Álvarez",
    "Zoe O’Brien-Smith",
    "Ольга Ванс",
    "艾达",
    "Ronan McKay",
]


@pytest.mark.parametrize("name", NAMES)
def test_all_spellings_of_a_name_are_folded_to_one(name):
    spellings = list_spellings(name)
    assert spellings[0] == name
    assert len(spellings) == len(set(spellings))
    assert {fold_text(spelling) for spelling in spellings} == {fold_text(name)}
    for changed in (
        name.upper(),
        name.lower(),
        unicodedata.normalize("NFD", name),
        name.replace(" ", "\n"),
        name.replace("’", "'"),
    ):
        assert changed in spellings


def test_texts_that_mean_something_else_stay_apart():
    texts = ["Ada", "Adam", "Jose", "José", "Ada B", "AdaB", "Ada-B", "艾达"]
    assert len({fold_text(text) for text in texts}) == len(texts)
    assert fold_text("  A\nb\u00a0 C ") == "a b c"
    assert fold_text("Straße") == fold_text("STRASSE")
