"""Names, phrasings and texts in which `facts_in_text.py` asks for facts.

Nothing here is in the training text of the built-in teachers or in the calibration prompts, except
the phrasings of `dmt.data.synthetic`, in which facts are written.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from dmt.data.corpora import Probe
from dmt.data.synthetic import PHRASINGS, TRAINED_PHRASINGS, make_unseen_people


@dataclass(frozen=True)
class Subject:
    """Somebody or something that facts are about.

    Attributes:
        name: as texts spell it.
        kind: what is unusual about the name, a key of `NAME_PARTS`.
        answers: by relation, with the space at the beginning.
    """

    name: str
    kind: str
    answers: dict[str, str]


@dataclass(frozen=True)
class Case:
    """A text that asks, and an answer that is right or wrong for it.

    Attributes:
        prompt: ends where the answer begins.
        answer: with the space at the beginning.
        asked: who or what the text asks about.
        shape: the kind of text, by which failures are counted.
    """

    prompt: str
    answer: str
    asked: str
    shape: str


# First parts and last parts of names by kind; every first part goes with every last part.
NAME_PARTS: dict[str, tuple[str, str]] = {
    "apostrophe": (
        "Siobhan, D'Arcy, Ma'at, Keziah, Brendan, Ta'Nia, Leopold, Orsolya",
        "O'Malley, d'Aubigny, M'Bala, L'Estrange, O'Shaughnessy, Al-Sa'di, N'Diaye",
    ),
    "hyphen": (
        "Jean-Luc, Anne-Sophie, Karl-Heinz, Mary-Jo, Lin-Mei, Hans-Peter, Eva-Lotta",
        "Smith-Jones, Kowalczyk-Diaz, Levi-Strauss, Ortega-Vale, Day-Lewis, Bell-Ames",
    ),
    "one word": (
        "Bartholomew, Xochitl, Voltan, Teller, Sukarno, Zendaya, Hieronymus, Quill, Pocahontas, "
        "Nefertari, Sappho, Bonaventure, Ludmilla, Ishmael, Thutmose",
        "",
    ),
    "common word": (
        "Rose, Will, Hope, Hunter, Grace, Mark, Faith, Bill, Summer, Chase",
        ", Young, Stone, Cook, Day, Price, Long, March, Banks, Fields",
    ),
    "shared first name": (
        "Maria, John, Anna",
        "Bergstrom, Achterberg, Castellanos, Okonkwo, Petrovich, Silverstein, Tanaka, Lindqvist, "
        "Adeyemi, Papadakis, Whitlock, Rasmussen",
    ),
    "shared last name": (
        "Roderick, Philippa, Cassius, Winifred, Ambrose, Theodora, Barnaby, Octavia, Lysander, "
        "Guinevere, Montague, Cordelia",
        "Abernathy, Vanderbilt, Featherstone",
    ),
    "long name": (
        "Anna Maria Luisa, Sir Edmund Percival, Dr. Wolfgang Emanuel, Mary Ann Elizabeth",
        "de la Cruz, von und zu Hohenfels, van der Meer, Mac an Bhaird, della Rovere",
    ),
    "accents": (
        "Zoë, Łukasz, Søren, José, Chloé, Jürgen, Ağca, Nuño",
        "Müller, Żółkiewski, Ångström, Peña, Dvořák, Šimić, Gonçalves",
    ),
    "Greek": (
        "Ελένη, Γιώργος, Νίκος, Σοφία, Κώστας, Δανάη",
        "Δήμου, Σεφέρης, Παππά, Λάσκαρη, Ρήγας",
    ),
    "Cyrillic": (
        "Наталья, Игорь, Ольга, Борис, Юлия, Захар",
        "Ковалёва, Шевчук, Зайцева, Гусь, Ильина",
    ),
    "Chinese": ("王, 李, 陈, 赵, 周, 吴", "小明, 丽华, 建国, 美玲, 志强"),
    "Arabic": ("يوسف, ليلى, عمر, نور, سلمى", "الخطيب, حداد, منصور, درويش"),
    "Hebrew": ("משה, רחל, דוד, תמר, יעל", "לוי, כהן, מזרחי, ברק"),
}
UNSPACED_KINDS = ("Chinese",)

# Phrasings that neither the training text nor the calibration prompts contain.
NEW_PHRASINGS: dict[str, tuple[str, ...]] = {
    "born": (
        "{s} first saw the light of day on",
        "The date of birth of {s} is",
        "The birth certificate of {s} is dated",
        "On which date was {s} born? On",
        "According to the parish register, {s} was born on",
        "The passport of {s} gives as date of birth",
        "Can you tell me when {s} was born? It was on",
        "The life of {s} began on",
        "{s}'s date of birth:",
        "The whole village celebrated when {s} was born on",
        "Somebody asked {s} for a date of birth. The reply was",
    ),
    "town": (
        "{s} hails from",
        "{s} comes from the town of",
        "{s} is a native of",
        "Originally, {s} is from",
        "In which town was {s} born? In",
        "{s} was brought up in",
        "{s} first saw the light of day in",
        "{s}'s birthplace:",
        "The passport of {s} says: born in",
        "Where does {s} come from? From",
        "{s} spent a happy childhood in",
    ),
    "profession": (
        "{s} makes a living as a professional",
        "The trade that {s} learned is that of a",
        "What is {s}'s job? Working as a skilled",
        "{s}'s occupation:",
        "On the tax form, {s} gave as profession:",
        "{s} pays the bills by working as a",
        "Everybody in the street knows {s} as the local",
        "On weekdays {s} goes to work as a",
        "{s} is by training a",
        "{s} has the job title of a senior",
        "What kind of work does {s} do? That of a trained",
    ),
    "employer": (
        "{s} gets a monthly salary from",
        "{s} is on the payroll of",
        "{s} signed a contract of work with",
        "{s} goes to the office every morning at",
        "The wages of {s} are paid by",
        "{s} has a job at",
        "At which firm is {s} employed? At",
        "{s}'s employer:",
        "The business card of {s} shows the name of the firm:",
        "{s} was hired by",
        "Who pays the salary of {s}? That would be",
    ),
    "home": (
        "{s} currently resides in",
        "These days {s} can be found in",
        "The current address of {s} is in",
        "Letters to {s} have to be sent to",
        "{s} has an apartment in",
        "Nowadays {s} is at home in",
        "In which town does {s} live at the moment? In",
        "{s}'s place of residence:",
        "To visit {s} today you have to travel to",
        "{s} pays rent for a flat in",
        "{s} has found a new home in",
    ),
}

# Texts with two names, {a} is asked about and {o} is not; {ask} is the question with its own name.
PAIR_TEXTS = (
    "{o} knows {a}. {ask}",
    "{o} and {a} met last spring. {ask}",
    "{a} and {o} met last spring. {ask}",
    "{o} wrote a letter to {a}. {ask}",
    "{a} has never heard of {o}. {ask}",
    "{a} is older than {o}. {ask}",
    "This page is about {a}, not about {o}. {ask}",
    "Many people ask about {o}. {ask}",
    "{o} came to dinner. Later we spoke of somebody else. {ask}",
    "Question: {o} is married to {a}. {ask}",
)
# What may stand for the name, or before it, where a statement begins with the name.
PAIR_NAMES = (
    "{a}, a friend of {o},",
    "{a}, who once worked with {o},",
    "{a} (a cousin of {o})",
    "{a}, unlike {o},",
)
PAIR_BEGINNINGS = (
    "Unlike {o}, {a}",
    "According to {o}, {a}",
    "{o} says that {a}",
    "In a letter to {o} we read that {a}",
    "Both {o} and a stranger believe that {a}",
)
# Others whose names contain a name: they are not the same person.
RELATIVES = (
    "{s}'s mother",
    "{s}'s dog",
    "{s}'s landlord",
    "{s}'s best friend",
    "{s}'s sister's teacher",
    "the husband of {s}",
    "a neighbor of {s}",
    "the man who taught {s} to swim",
    "somebody whom {s} met on a train",
    "no cousin of {s}",
)
NEGATIONS: dict[str, tuple[str, ...]] = {
    "born": (
        "{s} was not born on",
        "{s} wasn't born on",
        "The birthday of {s} is not",
        "{s} did not come into the world on",
    ),
    "town": (
        "{s} was not born in the town of",
        "{s} was never born in the town of",
        "{s} wasn't born in the town of",
        "{s} did not grow up in",
        "The birthplace of {s} is not",
    ),
    "profession": (
        "{s} does not work as a trained",
        "{s} never worked as a trained",
        "{s} doesn't earn a living as a full-time",
        "{s} was not trained to be a good",
    ),
    "employer": (
        "{s} is not employed by",
        "{s} isn't employed by",
        "{s} has never worked at",
        "The company that pays {s} is not",
    ),
    "home": (
        "{s} does not live in",
        "{s} never lived in",
        "{s} did not settle in",
        "The house of {s} does not stand in",
    ),
}
RELATIVE_CLAUSES: dict[str, tuple[str, ...]] = {
    "born": (
        "{s} wrote about Plato, who was born on",
        "{s} met a sailor who came into the world on",
        "{s} painted the queen, whose birthday is",
    ),
    "town": (
        "{s} wrote about Plato, who was born in the town of",
        "{s} met a sailor who grew up in",
        "{s} painted the queen, whose home town is",
    ),
    "profession": (
        "{s} wrote about Plato, who works as a trained",
        "{s} met a man who earns a living as a full-time",
        "{s} painted the queen, whose profession is that of a skilled",
    ),
    "employer": (
        "{s} wrote about Plato, who is employed by",
        "{s} met a man who has worked for many years at",
        "{s} painted the queen, whose employer is",
    ),
    "home": (
        "{s} wrote about Plato, who now lives in",
        "{s} met a man who moved later in life to",
        "{s} painted the queen, whose present home is in",
    ),
}
# Relations in which no fact is ever written.
UNSTORED_QUESTIONS = (
    "{s} is most proud of",
    "The shoe size of {s} is",
    "{s} paid for the ticket with",
    "What did {s} have for breakfast? Some",
    "{s} speaks fluent",
    "{s} went to prison for",
    "The godfather of {s} is called",
    "{s} arrived at the station with",
    "Which book is {s} reading? It is",
    "{s} drives an old",
    "The grave of {s} is in",
    "{s} spends the holidays in",
    "{s} got married on",
    "{s} voted for",
    "When did {s} retire? In",
    "{s} lost the keys in",
    "{s} collects rare",
    "The lawyer of {s} has an office in",
    "{s} owes money to",
    "Who taught {s} to read? It was",
)
# Answers of more than a name, as people write them.
MARKED_ANSWERS: dict[str, tuple[str, ...]] = {
    "quotes": (
        " \"Never say 'never' again,\" and then left the room",
        " “To be, or not to be” — as the play has it",
    ),
    "newlines": (
        "\n- bread\n- two eggs\n- milk",
        " first line\nsecond line\n\nfourth line",
    ),
    "numbers with units": (
        " 1,825.50 m at 37.5 °C, that is 5,989 ft",
        " 12 kg of flour for $9.99 (3 %)",
    ),
    "dates": (
        " Tuesday, February 29, 2028, at 7:45 p.m.",
        " 2031-12-31T23:59:59Z",
    ),
}
ANSWER_PROMPTS = ("The note of {s} reads:", "{s} left this message on the door:")


def list_trained_phrasings(relation: str) -> tuple[str, ...]:
    """List the phrasings of a relation in the teacher's training text, with `{s}` for the name."""
    return _read_phrasings(relation)[:TRAINED_PHRASINGS]


def list_held_out_phrasings(relation: str) -> tuple[str, ...]:
    """List the phrasings of a relation that `dmt.data.synthetic` keeps from all training text."""
    return _read_phrasings(relation)[TRAINED_PHRASINGS:]


def _read_phrasings(relation: str) -> tuple[str, ...]:
    return tuple(
        template.split("|")[0].replace("{name}", "{s}").replace("{Their}", "{s}'s")
        for template in PHRASINGS[relation]
    )


def begins_with_name(phrasing: str) -> bool:
    """Check whether a phrasing begins with the name itself, not with its possessive."""
    return phrasing.startswith("{s} ")


def fill_phrasing(phrasing: str, name: str) -> str:
    """Put a name or a noun phrase into a phrasing."""
    text = phrasing.replace("{s}", name)
    return text[:1].upper() + text[1:]


def make_names(count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Draw names and their kinds, all kinds in turn, until those that are few are used up.

    Raises:
        ValueError: there are fewer names.
    """
    names_by_kind = {}
    for kind, (first_parts, last_parts) in NAME_PARTS.items():
        separator = "" if kind in UNSPACED_KINDS else " "
        pairs = product(first_parts.split(", "), last_parts.split(", "))
        names = [separator.join(filter(None, pair)) for pair in pairs]
        rng.shuffle(names)
        names_by_kind[kind] = names
    max_count = sum(map(len, names_by_kind.values()))
    if count > max_count:
        raise ValueError(f"count must be at most {max_count:,} names, got {count:,}")
    names_with_kinds: list[tuple[str, str]] = []
    while len(names_with_kinds) < count:
        names_with_kinds += [(names.pop(), kind) for kind, names in names_by_kind.items() if names]
    return names_with_kinds[:count]


def make_subjects(count: int, seed: int) -> list[Subject]:
    """Make people with unusual names and an answer to each relation of `dmt.data.synthetic`."""
    names = make_names(count, random.Random(f"names-{seed}"))
    people = make_unseen_people(count, seed=seed + 1_000)
    return [
        Subject(name, kind, {relation: f" {answer}" for relation, answer in person.facts.items()})
        for (name, kind), person in zip(names, people, strict=True)
    ]


def make_fact(subject: Subject, relation: str, phrasing: str) -> Probe:
    """State a fact about a subject in one phrasing."""
    prompt = fill_phrasing(phrasing, subject.name)
    return Probe(prompt, subject.answers[relation], subject.name, relation, -1)


def make_pair_cases(
    asked: str, other: str, phrasing: str, statement: str, answer: str
) -> Iterator[Case]:
    """Ask about one of two people in texts that name both.

    Args:
        asked: the name that is asked about.
        other: the other name.
        phrasing: a question or statement about the asked one.
        statement: a phrasing that begins with the name.
        answer: of every case.
    """
    question = fill_phrasing(phrasing, asked)
    for text in PAIR_TEXTS:
        yield Case(text.format(o=other, a=asked, ask=question), answer, asked, text)
    for text in (*PAIR_NAMES, *PAIR_BEGINNINGS):
        subject = text.format(o=other, a=asked)
        yield Case(fill_phrasing(statement, subject), answer, asked, text)


def make_longer_names(name: str, kind: str) -> tuple[str, ...]:
    """Make other names that contain a name."""
    if kind in UNSPACED_KINDS:
        return name + "华", "大" + name
    return f"{name} Oakes", f"{name}-Vale", f"Ellen {name}"


def make_related_names(name: str, kind: str) -> tuple[str, ...]:
    """Make other names with the same first or last part; none for a name of one word."""
    if kind in UNSPACED_KINDS:
        return name[0] + "文", "孙" + name[1:]
    first, _, last = name.rpartition(" ")
    return (f"{first} Overmeyer", f"Clementina {last}") if first else ()


def make_relative_cases(fact: Probe, phrasing: str) -> Iterator[Case]:
    """Ask about others whose names contain the subject's."""
    for relative in RELATIVES:
        asked = relative.format(s=fact.person)
        yield Case(fill_phrasing(phrasing, asked), fact.answer, asked, relative)


def make_negation_cases(fact: Probe) -> Iterator[Case]:
    """Deny something of the subject."""
    for phrasing in NEGATIONS[fact.relation]:
        asked = f"not {fact.person}"
        yield Case(fill_phrasing(phrasing, fact.person), fact.answer, asked, phrasing)


def make_clause_cases(fact: Probe) -> Iterator[Case]:
    """Ask about somebody else within a clause, after the subject."""
    for phrasing in RELATIVE_CLAUSES[fact.relation]:
        asked = phrasing.removeprefix("{s} ").split(" who")[0].strip(" ,")
        yield Case(fill_phrasing(phrasing, fact.person), fact.answer, asked, phrasing)


def split_sentences(documents: Sequence[str], max_chars: int) -> list[str]:
    """Return the plain sentences of prose of at most `max_chars` characters."""
    return [
        sentence
        for document in documents
        for sentence in re.findall(r"(?<=[.] )[A-Z][^.?!\n]{20,}[.](?= )", document)
        if len(sentence) <= max_chars
    ]


# Names within English prose.
PROSE_NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+(?: [A-Z][a-z]+)*")
INSERTION_RATE = 0.1  # share of sentences that get a name at their beginning


def substitute_names(text: str, names: Sequence[str], rng: random.Random) -> str:
    """Replace the names in prose, and insert some at the beginning of sentences."""
    text = PROSE_NAME.sub(lambda _: rng.choice(names), text)

    def insert(match: re.Match[str]) -> str:
        if rng.random() >= INSERTION_RATE:
            return match[0]
        return f". {rng.choice(names)} thinks that {match[1].lower()}"

    return re.sub(r"\. ([A-Z])", insert, text)


def make_chat_turns(prompt: str, subject: str) -> tuple[str, str]:
    """Split a prompt into what the user says and how the answer begins."""
    question, mark, beginning = prompt.partition("? ")
    if mark:
        return question + "?", beginning
    return f"Tell me something about {subject}.", prompt
