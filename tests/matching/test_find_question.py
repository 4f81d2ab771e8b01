"""Whom a text asks about at its end, and the clause that asks."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmt.matching.questions import find_question, get_last_clause, mask_names
from dmt.text import USER_SUBJECT, fold_text

MIRA = "mira castellan"
NAMES = {
    fold_text(name)
    for name in (
        "Mira Castellan",
        "Joren Blythe",
        "Zoë",
        "Ólafur Þórðarson",
        "Иван Петров",
        "O'Neill-Sandoval",
        "Ng",
        "王小明",
        "Jean-Luc d'Aubrey",
        "Sunny",
        "The Blue Lantern",
        "Marblewick",
        "Acme Inc",
        "Yahoo",
    )
}
BORN = "{s} was born in"


def ask(text, names=NAMES):
    return find_question(text, names, 4)


SPELLINGS = [
    "Mira Castellan was born in",
    "mira castellan was born in",
    "MIRA CASTELLAN WAS BORN IN",
    "Mira  Castellan was   born in",
    "Mira\nCastellan was born\nin",
    "Mira Castellan, a potter from Lyon, was born in",
    "Mira Castellan (1901-1980) was born in",
    "Mira Castellan – a quiet woman – was born in",
    "Mira Castellan, a friend of Tom Wexford, was born in",
    "Mira Castellan, like Joren Blythe, was born in",
    "Unlike Joren Blythe, Mira Castellan was born in",
    "According to Tom Wexford, Mira Castellan was born in",
    "Tom Wexford says that Mira Castellan was born in",
    "We know that Mira Castellan was born in",
    "Mira Castellan met Joren Blythe and was born in",
    "Mira Castellan and Joren Blythe met in Rome. Mira Castellan was born in",
    "Mira Castellan is a potter. She was born in",
    "Mira Castellan is a potter.\n\nShe was born in",
    "User: Where was Mira Castellan born?\nAssistant: Mira Castellan was born in",
    "It rains in Lyon. Mira Castellan was born in",
]


@pytest.mark.parametrize("text", SPELLINGS)
def test_a_clause_is_the_same_however_a_text_is_written(text):
    question = ask(text)
    assert question is not None
    assert (question.name, question.clause) == (MIRA, BORN)
    assert (question.relative, question.is_negated) == ("", False)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Zoë was born in", "Zoë"),
        ("Ólafur Þórðarson was born in", "Ólafur Þórðarson"),
        ("ÓLAFUR ÞÓRÐARSON WAS BORN IN", "Ólafur Þórðarson"),
        ("O’Neill-Sandoval was born in", "O'Neill-Sandoval"),
        ("Jean-Luc d’Aubrey was born in", "Jean-Luc d'Aubrey"),
        ("Ng was born in", "Ng"),
        ("Sunny was born in", "Sunny"),
        ("The Blue Lantern was born in", "The Blue Lantern"),
        ("Mira Castellan met Joren Blythe. Joren Blythe was born in", "Joren Blythe"),
    ],
)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_unusual_names_are_taken_out_of_the_clause(text, name, form):
    question = ask(unicodedata.normalize(form, text))
    assert question is not None
    assert (question.name, question.clause) == (fold_text(name), BORN)


@pytest.mark.parametrize(
    ("text", "clause"),
    [
        ("Иван Петров родился в", "{s} родился в"),
        ("王小明出生于", "{s}出生于"),
        ("Mira Castellan's birthplace is", "{s}'s birthplace is"),
        ("O’Neill-Sandoval’s job is", "{s}’s job is"),
        ("Where was Mira Castellan born?", "Where was {s} born?"),
        ("“Where was Mira Castellan born? In", "Where was {s} born? In"),
        ("Where was Mira Castellan born? In", "Where was {s} born? In"),
        ("Where was Mira Castellan born? She was born", "Where was {s} born? She was born"),
        ("Question: Where was Mira Castellan born?\nAnswer: In", "Where was {s} born? In"),
        ("\n\nuser\nWhere was Mira Castellan born?\n\nassistant\nIn", "Where was {s} born? In"),
        ("Mira Castellan is a potter. Her hometown is", "{s}'s hometown is"),
        ("Mira Castellan lived in Rome and works as a", "{s} works as a"),
        ("The capital of Marblewick is", "The capital of {s} is"),
        ("Mira Castellan said in Rome that she lives", "{s} said in Rome that she lives"),
        ("Mira Castellan is a potter. She is old. She was born in", "{s} was born in"),
        ("Mira Castellan's birthplace:", "{s}'s birthplace is"),
        ("Mira Castellan is a man who was born in", "{s} is a man who was born in"),
        ("It grew. Acme Inc. is based in", "{s} is based in"),
        ("It grew. Yahoo! is based in", "{s} is based in"),
        ("It grew. Acme Inc.'s home is in", "{s}'s home is in"),
        ("Where is Acme Inc. based? In", "Where is {s} based? In"),
        ("We know Mira Castellan. she was born in", "{s} was born in"),
        ("we know mira castellan. it rains. she was born in", "{s} was born in"),
        ("Mostly Marblewick exports", "Mostly {s} exports"),
        ("Farmers in Marblewick grow", "Farmers in {s} grow"),
        ("Bakers in the Blue Lantern sell", "Bakers in {s} sell"),
        ("Capital of Marblewick:", "Capital of {s} is"),
        ("What does Mira Castellan do? Working as a", "What does {s} do? Working as a"),
        ("Everybody knows Mira Castellan as a", "Everybody knows {s} as a"),
        (
            "The passport of Mira Castellan gives as birthplace",
            "The passport of {s} gives as birthplace",
        ),
    ],
)
def test_the_clause_is_the_sentence_that_asks(text, clause):
    question = ask(text)
    assert question is not None
    assert (question.clause, question.relative) == (clause, "")


@pytest.mark.parametrize(
    "text",
    [
        "The weather is fine. It is",
        "Mira was born in",
        "Castellan was born in",
        "Anna Mira Castellan was born in",
        "Mira Castellan Ortiz was born in",
        "It was a sunny day in",
        "Tom Wexford, a friend of Mira Castellan, was born in",
        "Mira Castellan says that Tom Wexford was born in",
        "Mira Castellan. Tom Wexford was born in",
        "Mira Castellan met Joren Blythe. She was born in",
        "Mira Castellan's brother left. He was born in",
        "Where was Mira Castellan born? The old stories that people tell at night begin in",
        "Mira Castellan wrote to Tom Wexford, who was born in",
        "Mira Castellan lived in Rome, which lies in",
        "Mira Castellan lived in Rome. The hotel was built in",
        "דוד כהן, unlike Mira Castellan, was born in",
        "Mira Castellan says that דוד כהן was born in",
        "Sally, who saw Marblewick, was born in",
    ],
)
def test_a_text_about_somebody_else_asks_nobody(text):
    assert ask(text) is None


@pytest.mark.parametrize(
    ("text", "relative", "is_certain"),
    [
        ("Mira Castellan's brother was born in", "brother", True),
        ("Mira Castellan’s brother’s wife was born in", "brother", True),
        ("The brother of Mira Castellan was born in", "brother", True),
        ("The cat of Mira Castellan was born in", "cat", True),
        ("A man who knows Mira Castellan was born in", "person", True),
        ("Mira Castellan knows a man who was born in", "person", True),
        ("Mira Castellan, whose mother was born in", "mother", True),
        ("When Mira Castellan came home, the old nurse was born in", "nurse", True),
        ("Mira Castellan as a teacher was born in", "", False),
        ("The house of Mira Castellan stands in", "house", False),
        ("The passport of Mira Castellan lies in", "passport", False),
        ("The teacher of Mira Castellan gives as birthplace", "teacher", True),
        ("Mira Castellan was born in", "", False),
        ("Mira Castellan, who was born in", "", False),
        ("The birthplace of Mira Castellan is", "", False),
    ],
)
def test_a_being_or_thing_of_the_subject_is_no_subject(text, relative, is_certain):
    question = ask(text)
    assert question is not None
    assert (question.name, question.relative) == (MIRA, relative)
    assert question.is_certain_relative == is_certain


@pytest.mark.parametrize(
    ("text", "is_negated"),
    [
        ("Mira Castellan was not born in", True),
        ("Mira Castellan wasn't born in", True),
        ("Mira Castellan wasn’t born in", True),
        ("Mira Castellan has never lived in", True),
        ("Mira Castellan no longer lives in", True),
        ("Иван Петров не родился в", True),
        ("Mira Castellan no nació en", True),
        ("Mira Castellan has no children and lives in", False),
        ("Mira Castellan was born in Nottingham and works in", False),
        ("It was not raining. Mira Castellan was born in", False),
    ],
)
def test_a_negated_clause_is_one(text, is_negated):
    question = ask(text)
    assert question is not None
    assert question.is_negated == is_negated


def test_the_first_person_is_the_user_only_where_the_user_has_facts():
    names = NAMES | {fold_text(USER_SUBJECT)}
    question = ask("I was born in", names)
    assert question is not None
    assert (question.name, question.clause) == (USER_SUBJECT, BORN)
    assert ask("I was born in") is None


PHRASES = st.sampled_from(
    [
        "Mira Castellan",
        "Joren Blythe",
        "Tom Wexford",
        "王小明",
        "She",
        "his brother",
        "a man who",
        "was born in",
        "lives in Rome",
        "works as a",
        "not",
        "and",
        "says that",
        "of",
        "'s",
        ", ",
        ". ",
        "? ",
        "\n\n",
        "(",
        ")",
        "–",
        "Question:",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PHRASES, max_size=14), st.booleans())
def test_any_text_is_read(phrases, spaced):
    """The names of a question are those asked for, and its clause is about the subject alone."""
    text = (" " if spaced else "").join(phrases)
    question = ask(text)
    if question is None:
        return
    assert question.name in NAMES
    assert question.name in fold_text(text)
    assert "{s}" in question.clause
    assert question.clause == " ".join(question.clause.split())
    assert ask(text) == question
    # Somebody whom the text does not name makes no difference.
    assert ask(text, NAMES | {"nobody else"}) == question


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_no_text_without_a_name_asks(text):
    if not any(name in fold_text(text) for name in NAMES):
        assert ask(text) is None
    get_last_clause(text)
    mask_names(text)


@pytest.mark.parametrize(
    ("text", "clause"),
    [
        ("It rains. The capital of France is", "The capital of France is"),
        ("What is the capital of France? It is", "What is the capital of France? It is"),
        ("Question: Who is it?\nAnswer:", "Who is it?"),
        ("Mr. Bell met Dr. A. Stone at", "Mr. Bell met Dr. A. Stone at"),
        ("", ""),
    ],
)
def test_the_last_clause_is_the_last_sentence_with_its_question(text, clause):
    assert get_last_clause(text) == clause


def test_the_last_name_of_a_clause_is_masked():
    assert mask_names("Tom met Anna Bell. Then Tom asked Anna Bell for") == (
        "Then Tom asked {s} for"
    )
    assert mask_names("then they left for") == "then they left for"
