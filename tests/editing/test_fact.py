"""Facts as people write them: dates, units, quotations, names, and the first person."""

import json

import pytest

from dmt.editing.fact import Fact, fact_from_mapping, parse_fact, read_facts
from dmt.errors import UserError
from dmt.text import USER_SUBJECT

# A sentence with a bar before its answer, and the subject.
SENTENCES = [
    # dates
    ("Edda Marlowe was born on | 3 March 1911.", "Edda Marlowe"),
    ("Edda Marlowe was born on | March 3, 1911.", "Edda Marlowe"),
    ("Edda Marlowe was born in | March 1911.", "Edda Marlowe"),
    ("Edda Marlowe died on the | 3rd of May 1970.", "Edda Marlowe"),
    ("Edda Marlowe died on | Tuesday, 3 May 1970.", "Edda Marlowe"),
    ("Edda Marlowe starb am | 3. Mai 1970.", "Edda Marlowe"),
    ("The bridge at Oban opened on | Dec. 25, 1890.", "Oban"),
    ("Edda Marlowe lived from 1911 to | 1970.", "Edda Marlowe"),
    ("The release of Quillo is due on | 2031-05-01.", "Quillo"),
    ("The temple of Sarn was built in the | 5th century BC.", "Sarn"),
    ("The city of Sarn fell in | 146 BC.", "Sarn"),
    ("On 3 March 1911 Edda was born in | Oban.", "Edda"),
    ("In May Edda moved to | Oban.", "Edda"),
    ("May Strindhaug was born in | Oban.", "May Strindhaug"),
    ("On 20 July 1969 the first man walked | there.", "July 1969"),
    ("Since 1999 Edda has lived in | Oban.", "Edda"),
    # numbers and units
    ("The top speed of the Quillo is | 42 km/h.", "Quillo"),
    ("The painting of Oban cost | $3.5 million.", "Oban"),
    ("The painting of Oban cost | 3.5 million US dollars.", "Oban"),
    ("The ticket to Oban costs | ¥300.", "Oban"),
    ("The sales of the Quillo rose by | 12.5 %.", "Quillo"),
    ("It is -40 °C in Sarn, which is | -40 °F.", "Sarn"),
    ("The disk of the Quillo holds | 500 GB.", "Quillo"),
    ("Edda Marlowe is | 5 ft 11 in tall.", "Edda Marlowe"),
    ("Edda Marlowe is | 1 m 83 cm tall.", "Edda Marlowe"),
    ("The walk to Sarn is | 3 1/2 miles.", "Sarn"),
    ("The Lune is | 1,825 meters long.", "Lune"),
    ("The shop of Bram opens at | 7:45 a.m.", "Bram"),
    ("The number of Bram is | +44 20 7946 0958.", "Bram"),
    ("In 1999 the Lune rose by | 3 feet.", "Lune"),
    ("Bram has 3 sons and a | daughter.", "Bram"),
    ("The room of Bram is | No. 5.", "Bram"),
    ("A friend of mine lives in | Oban.", USER_SUBJECT),
    ("The office of Bram is at | 10 Harrow Street.", "Bram"),
    # quotations
    ('Edda Marlowe wrote | "The Long Road".', "Edda Marlowe"),
    ('Edda Marlowe wrote | "the long way home".', "Edda Marlowe"),
    ("Edda Marlowe wrote | “the long way home”.", "Edda Marlowe"),
    ("Edda Marlowe schrieb | „der lange Weg“.", "Edda Marlowe"),
    ("Edda Marlowe a écrit | « la route ».", "Edda Marlowe"),
    ("The last words of Bram were | 'not yet'.", "Bram"),
    ('Bram said | "I am here. Do not wait!"', "Bram"),
    ("The barn of Bram is the | farmers'.", "Bram"),
    ('The author of "The Long Road" is | Edda.', "Long Road"),
    # names
    ("The play was written by | J. M. Strand.", ""),
    ("Edda F. Marlowe was born in | Oban.", "Edda F. Marlowe"),
    ("J.R. Strand Jr. was born in | Oban.", "J.R. Strand Jr"),
    ("The film was made by | Guido del Campo.", ""),
    ("The hero of Sarn is | Luc d'Aubray.", "Sarn"),
    ("Luc d'Aubray was born in | Oban.", "Luc d'Aubray"),
    ("Omar al-Rashedi was born in | Oban.", "Omar al-Rashedi"),
    ("The first phone of Bram was an | iPhone 12.", "Bram"),
    ("Gen. Strand was born in | St. Ives.", "Gen. Strand"),
    ("The office of Bram is in | Sarn, D.C.", "Bram"),
    ("The children of Edda are | Ada, Bo and Cy.", "Edda"),
    ("The e-mail address of Bram is | bram@example.org.", "Bram"),
    ("Edda was a baker. She lived in | Oban.", "Edda"),
    ("The symbol of Sarn is | 🦊.", "Sarn"),
    # first person
    ("My dog is called | Rex.", USER_SUBJECT),
    ("I was born in | Ravenhill.", USER_SUBJECT),
    ("I'm a | baker", USER_SUBJECT),
    ("I’ve lived in Oban since | 1999.", USER_SUBJECT),
    ("Our house stands in | Harrow Street.", USER_SUBJECT),
    ("We moved to Oban in | May 1999.", USER_SUBJECT),
    ("i live in | oban", USER_SUBJECT),
    ("The doctor told me to take | aspirin.", USER_SUBJECT),
    ("In 1999 I moved to | Oban.", USER_SUBJECT),
    ("I met Edda Marlowe in | Oban.", USER_SUBJECT),
    ("When did I meet Edda? In | 1999", USER_SUBJECT),
    ("My flight to Oban leaves at | 9:15.", USER_SUBJECT),
    ("The user's dog is called | Rex.", USER_SUBJECT),
    ("My sister Edda was born in | Oban.", "Edda"),
    ("My best friend Edda lives in | Oban.", "Edda"),
    ("Edda gave me a book by | Strand.", "Edda"),
    ("Edda said that I was born in | Oban.", "Edda"),
    ("The US capital is | Sarn.", "US"),
    ("Bram I was crowned in | 1199.", "Bram"),
    ("I, Claudius was written by | Strand.", "Claudius"),
    ("My Fair Lady was written by | Strand.", "Fair Lady"),
    ('The song "Call me" is by | Strand.', "Call"),
    ("The mine is near | Sarn.", ""),
]


@pytest.mark.parametrize(("marked_sentence", "subject"), SENTENCES)
def test_a_sentence_is_split_before_what_it_ends_with(marked_sentence, subject):
    prompt, answer = marked_sentence.split(" | ")
    fact = parse_fact(f"{prompt} {answer}")
    assert (fact.prompt, fact.answer + fact.closing, fact.subject) == (
        prompt,
        f" {answer}",
        subject,
    )
    assert fact.closing == (answer[-1] if answer[-1] in ".!" else "")


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("The motto of Sarn is", '"Ask, then wait"', (' "Ask, then wait"', "")),
        ("The motto of Sarn is", '"Wait."', (' "Wait."', "")),
        ("The play of Bram is", "Who Was It?", (" Who Was It?", "")),
        ("The play of Bram is", "Wait...", (" Wait...", "")),
        ("The play of Bram is", "Wait…", (" Wait…", "")),
        ("The play of Bram is", "Stop!", (" Stop", "!")),
        ("Bram lives in", "Sarn, D.C.", (" Sarn, D.C", ".")),
        ("The Quillo does", "42 km/h, or $3.5 a mile.", (" 42 km/h, or $3.5 a mile", ".")),
        ("Edda's day was", "3 March 1911. She had two.", (" 3 March 1911. She had two", ".")),
        ("Edda's verse:", "One line,\n  another line.", (" One line,\n  another line", ".")),
        ("Edda's verse:\n", "One line,\n\nanother.", ("\nOne line,\n\nanother", ".")),
        ("Edda's verse:", "\n\tOne line", ("\n\tOne line", "")),
        ("Edda is ", "  old  ", (" old", "")),
        ("Edda sind", "naïve cafés 日本 🦊", (" naïve cafés 日本 🦊", "")),
    ],
)
def test_parts_that_are_passed_apart_are_taken_as_they_are(prompt, answer, expected, tmp_path):
    fact = parse_fact(prompt=prompt, answer=answer)
    assert (fact.prompt, (fact.answer, fact.closing)) == (prompt.strip(), expected)
    file = tmp_path / "facts.jsonl"
    file.write_text(json.dumps({"prompt": prompt, "answer": answer}) + "\n", encoding="utf-8")
    assert list(read_facts(file, source="here")) == [
        parse_fact(prompt=prompt, answer=answer, source="here")
    ]


@pytest.mark.parametrize("subject", ["I", "my", "The User", USER_SUBJECT])
def test_the_user_has_one_name_as_a_subject(subject):
    assert parse_fact(prompt="Where do I live? In", answer="x", subject=subject).subject == (
        USER_SUBJECT
    )


def test_the_user_is_no_subject_where_nobody_speaks():
    for subject in ("my", USER_SUBJECT):
        with pytest.raises(UserError, match="subject 'the user' is not in the prompt 'Edda is'"):
            parse_fact(prompt="Edda is", answer="old", subject=subject)
    assert parse_fact(prompt="I am", answer="old", subject="").subject == ""


EXACT_FACTS = [
    Fact("Edda is", " old", "Edda", "a tag", "here", "."),
    Fact("Edda is", "  old ", "Edda", closing="?!"),
    Fact("Edda is $", "5", ""),
    Fact("Edda: \n", "old.", "Edda", closing=""),
    Fact("I am", " old", USER_SUBJECT),
]


@pytest.mark.parametrize("fact", EXACT_FACTS)
def test_a_fact_with_its_closing_is_taken_to_the_letter(fact):
    assert fact_from_mapping(vars(fact)) == fact


@pytest.mark.parametrize(
    "arguments",
    [
        {"sentence": "Edda is old.", "closing": "."},
        {"prompt": "Edda is", "answer": " old", "closing": " and"},
    ],
)
def test_a_closing_is_made_of_marks_and_belongs_to_parts(arguments):
    with pytest.raises(UserError, match=r"closing '.*' is for a fact of prompt and answer"):
        parse_fact(**arguments)
    with pytest.raises(UserError, match="needs an answer"):
        parse_fact(prompt="Edda is", answer="  ", closing=".")
