"""Names in texts: of stored subjects, and those that look like names."""

import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmt.matching.mentions import Mention, find_mentions, find_names, list_candidate_names
from dmt.text import fold_text


def mention(text, *names):
    """Return the spellings that are mentions of names."""
    folded = {fold_text(name) for name in names}
    longest = max(len(name.split()) for name in folded)
    mentions = find_mentions(text, folded, longest)
    assert all(fold_text(text[m.start : m.end]) == m.name for m in mentions)
    return [text[m.start : m.end] for m in mentions]


@pytest.mark.parametrize(
    ("text", "name", "spelling"),
    [
        ("We saw Mira Castellan there", "Mira Castellan", "Mira Castellan"),
        ("we saw mira castellan there", "Mira Castellan", "mira castellan"),
        ("WE SAW MIRA CASTELLAN THERE", "Mira Castellan", "MIRA CASTELLAN"),
        ("(Mira Castellan)", "Mira Castellan", "Mira Castellan"),
        ("“Mira Castellan,” he said", "Mira Castellan", "Mira Castellan"),
        ("Mira  Castellan", "Mira Castellan", "Mira  Castellan"),
        ("Mira\nCastellan", "Mira Castellan", "Mira\nCastellan"),
        ("Mira Castellan's hat", "Mira Castellan", "Mira Castellan"),
        ("Mira Castellan’s hat", "Mira Castellan", "Mira Castellan"),
        ("James' hat", "James", "James"),
        ("Dr. Renn left", "Renn", "Renn"),
        ("We met Professor Renn there", "Renn", "Renn"),
        ("the firm NASA Renn works for", "Renn", "Renn"),
        ("Acme Inc.'s hats", "Acme Inc", "Acme Inc"),
        ("O’Neill-Sandoval left", "O'Neill-Sandoval", "O’Neill-Sandoval"),
        ("In M. C. Escher's house", "M. C. Escher", "M. C. Escher"),
        ("Yahoo! was sold", "Yahoo!", "Yahoo!"),
        ("Иван Петров живёт", "Иван Петров", "Иван Петров"),
        ("王小明出生于北京", "王小明", "王小明"),
        ("昨日、山田太郎は", "山田太郎", "山田太郎"),
        ("The Blue Lantern is open", "The Blue Lantern", "The Blue Lantern"),
    ],
)
def test_a_name_is_mentioned_however_it_is_written(text, name, spelling):
    assert mention(text, name) == [spelling]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Anna Mira Castellan left", "Mira Castellan"),
        ("Mira Castellan Ortiz left", "Mira Castellan"),
        ("Mira Castellan-Ortiz left", "Mira Castellan"),
        ("Mira left", "Mira Castellan"),
        ("Castellanos left", "Castellan"),
        ("New York is big", "York"),
        ("It was a sunny day", "Sunny"),
        ("the river rose", "Rose"),
        ("the sign says 王小明子 in red", "王小明"),
        ("then Henry VIII left", "Henry"),
    ],
)
def test_a_part_of_another_name_or_a_word_is_no_mention(text, name):
    assert mention(text, name) == []


def test_the_longest_name_is_mentioned():
    text = "From New York City to York and New York"
    assert mention(text, "York", "New York", "New York City") == [
        "New York City",
        "York",
        "New York",
    ]


def test_a_composed_and_a_decomposed_name_are_one():
    for text in ("NFC", "NFD"):
        for name in ("NFC", "NFD"):
            spelled = unicodedata.normalize(text, "Zoë Núñez left")
            assert mention(spelled, unicodedata.normalize(name, "Zoë Núñez"))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Then Mira Castellan met Tom in Rome.", ["Mira Castellan", "Tom", "Rome"]),
        ("The weather in Lyon is fine", ["Lyon"]),
        ("On Monday Jean-Luc d'Aubrey left", ["Jean-Luc d'Aubrey"]),
        ("Tom's Anna", ["Tom", "Anna"]),
        ("then Tom (Anna) left", ["Tom", "Anna"]),
        ("then Mr. Long left", ["Long"]),
        ("Tom, Anna and Joe", ["Tom", "Anna", "Joe"]),
        ("Usually Tom left", ["Tom"]),
        ("Emily left. Sterling left. Agnes left", ["Emily", "Sterling", "Agnes"]),
        ("Walking is fine", []),
        ("Bakers in Rome sell", ["Bakers", "Rome"]),
        ("once, then, דוד כהן met 王小明 in 1920", ["דוד כהן", "王小明"]),
        ("דוד כהן נולד בעיר רומא", []),
        ("it is what it is", []),
        ("ALL OF THIS IS LOUD", []),
    ],
)
def test_words_with_capitals_are_names(text, names):
    assert [text[name.start : name.end] for name in find_names(text)] == names


def test_a_mention_is_a_name_in_lower_case_too():
    text = "then mira left Rome"
    names = find_names(text, [Mention(5, 9, "mira")])
    assert names == [Mention(5, 9, "mira"), Mention(15, 19)]


WORDS = st.sampled_from(
    ["Mira", "Castellan", "mira", "'s", "(", "Rose", "rose", "王小明", "Dr.", ",", "é", "the"]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(WORDS, max_size=10), st.sampled_from(["", " ", "  ", "\n"]))
def test_mentions_are_among_the_candidates_and_apart(words, space):
    text = space.join(words)
    names = {"mira", "mira castellan", "rose", "王小明"}
    mentions = find_mentions(text, names, 2)
    assert {m.name for m in mentions} <= names & list_candidate_names(text, 2)
    assert all(first.end <= second.start for first, second in pairwise(mentions))
