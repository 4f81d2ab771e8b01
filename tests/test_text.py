"""Text as people write it."""

import unicodedata

import pytest

from dmt.text import (
    USER_SUBJECT,
    add_to_list,
    fold_text,
    is_first_person,
    join_with_space,
    mentions_user,
    remove_from_list,
)

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
    spellings = [
        name.upper(),
        name.lower(),
        name.title(),
        unicodedata.normalize("NFD", name),
        unicodedata.normalize("NFD", name.upper()),
        name.replace(" ", "\n"),
        name.replace(" ", "  "),
        name.replace("’", "'"),
    ]
    assert {fold_text(spelling) for spelling in spellings} == {fold_text(name)}


def test_texts_that_mean_something_else_stay_apart():
    texts = ["Ada", "Adam", "Jose", "José", "Ada B", "AdaB", "Ada-B", "艾达"]
    assert len({fold_text(text) for text in texts}) == len(texts)
    assert fold_text("  A\nb\u00a0 C ") == "a b c"
    assert fold_text("Straße") == fold_text("STRASSE")
    assert fold_text("Μαΐας") == fold_text("Μαΐας".upper())  # has no composed letter


def test_the_user_is_called_by_the_words_of_the_first_person():
    words = ["I", "i", "My", "my", "I’m", "i'm", "Our", "We’ve", "we've", "Ourselves"]
    assert all(map(is_first_person, words))
    assert not any(map(is_first_person, ["US", "ME", "MY", "Ada", "Iris", "the user"]))
    assert all(map(mentions_user, [*words, USER_SUBJECT, "The user"]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Where do I live?", True),
        ("it's mine.", True),
        ("I’m", True),
        ("The user’s dog", True),
        ("the\nuser is", True),
        ("The US economy", False),
        ("Myra and Wendy", False),
        ("i.e. imine", True),  # a lone i is a word of those who write without capitals
        ("the users are", False),
        ("", False),
    ],
)
def test_a_text_speaks_of_the_user_or_not(text, expected):
    assert mentions_user(text) is expected


def test_a_space_is_joined_where_one_is_written():
    assert [
        join_with_space(*texts)
        for texts in (("Ada", "runs"), ("艾达", "runs"), ("Ada", "在"), ("", ""))
    ] == [" ", "", "", " "]


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        ("Greek", "Latin", "Greek, Latin"),
        ("Greek, Latin", "Ionic", "Greek, Latin, Ionic"),
        ("rock and roll", "jazz", "rock and roll, jazz"),
        ("希腊语", "拉丁语", "希腊语、拉丁语"),
    ],
)
def test_a_value_is_added_to_a_list(text, value, expected):
    assert add_to_list(text, value) == expected
    assert remove_from_list(expected, value) == text


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        ("Ada, Bo and Cy", "Ada", "Bo and Cy"),
        ("Ada, Bo and Cy", "bo", "Ada and Cy"),
        ("Ada, Bo and Cy", "Cy", "Ada, Bo"),
        ("Ada, Bo, and Cy", "Cy", "Ada, Bo"),
        ("rock and roll, jazz", "rock and roll", "jazz"),
        ("jazz, Rock and Roll, soul", "rock  and roll", "jazz, soul"),
        ("Sarn, Ohio, Oban", "Sarn, Ohio", "Oban"),
        ("Sarn", "sarn", ""),
        ("Sarn", "Sar", None),
        ("Ada, Bo", "Ada, B", None),
        ("Ada, Bo", "", None),
    ],
)
def test_a_value_is_taken_out_of_a_list(text, value, expected):
    assert remove_from_list(text, value) == expected
