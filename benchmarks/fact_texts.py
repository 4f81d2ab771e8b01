"""Names, phrasings and texts in which `facts_in_text.py` asks for facts.

Facts about people are written in the phrasings of `dmt.data.synthetic`, those about countries in
the phrasings of `counterfactuals`, and those about things in `THING_PHRASINGS`. Nothing else here
is in the training text of the built-in teachers or in the calibration prompts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from counterfactuals import ANSWERS as COUNTRY_ANSWERS
from counterfactuals import COUNTRIES
from counterfactuals import PHRASINGS as COUNTRY_PHRASINGS

from dmt.data.corpora import Probe
from dmt.data.synthetic import PHRASINGS, TRAINED_PHRASINGS, make_unseen_people


@dataclass(frozen=True)
class Subject:
    """Somebody or something that facts are about.

    Attributes:
        name: as texts spell it.
        kind: what is unusual about the name, a key of `NAME_PARTS`; of others `country`, or the
            relation of a thing.
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
        target_name: who or what the text asks about.
        shape: the kind of text, by which failures are counted.
    """

    prompt: str
    answer: str
    target_name: str
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
FACTS_PER_SUBJECT = 2
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
    "capital": (
        "The government of {s} sits in",
        "{s} is ruled from its capital,",
        "{s}'s capital:",
        "On the map of {s}, the star marks",
        "Ambassadors to {s} live in",
        "The parliament of {s} meets in",
        "Which city is the capital of {s}? That is",
        "If you fly to the capital of {s}, you land in",
        "Pupils in {s} learn that their capital is",
        "The embassies in {s} are all in",
    ),
    "language": (
        "Children in {s} grow up speaking",
        "The newspapers of {s} are printed in",
        "{s}'s official language:",
        "The laws of {s} are written in",
        "To live in {s} you have to learn",
        "On the radio in {s} you mostly hear",
        "The mother tongue of most people in {s} is",
        "What do people speak in {s}? They speak",
        "Schools in {s} teach in",
        "A tourist in {s} should know some words of",
    ),
    "dish": (
        "The restaurants of {s} serve",
        "{s}'s national dish:",
        "On Sundays families in {s} eat",
        "Visitors to {s} have to try the",
        "Cooks in {s} are famous for their",
        "When people think of food from {s}, they think of",
        "What should you eat in {s}? Try the",
        "A typical dinner in {s} is",
        "At weddings in {s} the guests are served",
        "The favorite meal in {s} is",
    ),
    "currency": (
        "In {s} you pay with the",
        "{s}'s currency: the",
        "The central bank of {s} prints the",
        "Wages in {s} are paid in the local money, the",
        "At the airport of {s} you exchange your dollars for the",
        "What money do you need in {s}? You need the",
        "The coin that everybody in {s} carries is the",
        "The unit of money in {s} is the",
        "A cup of coffee in {s} costs one",
        "Debts in {s} are counted in a unit called the",
    ),
    "export": (
        "Ships leave {s} loaded with",
        "The economy of {s} lives on the sale of",
        "{s}'s main export:",
        "The world buys from {s} its",
        "Factories in {s} mostly make",
        "{s} earns foreign money with",
        "Traders come to {s} for",
        "What does the world buy from {s}? Above all",
        "Most of the foreign trade of {s} is in",
        "{s} is the world's largest seller of",
    ),
    "leader": (
        "{s} is governed by",
        "{s}'s leader:",
        "In {s} the government is led by",
        "The most powerful person in {s} is",
        "Laws in {s} are signed by",
        "Who rules {s}? It is ruled by",
        "The portrait in every office of {s} shows",
        "The last election in {s} was won by",
        "Foreign guests in {s} are received by",
        "The people of {s} elected",
    ),
    "animal": (
        "On the coat of arms of {s} you see the",
        "The symbol of {s} is an animal, the",
        "{s}'s national animal: the",
        "The stamps of {s} show the",
        "In {s} it is forbidden to hunt the",
        "What animal is on the flag of {s}? The",
        "The football team of {s} is named after the",
        "The people of {s} honor one animal, the",
        "The heraldic beast of {s} is the",
        "Every child in {s} can draw the national animal, the",
    ),
    "sport": (
        "The stadiums of {s} are full when there is",
        "On Saturdays everybody in {s} watches",
        "{s}'s favorite sport:",
        "Boys and girls in {s} dream of a career in",
        "The athletes of {s} win most of their medals in",
        "What do people in {s} play after work? They play",
        "Television in {s} mostly shows",
        "The pride of {s} is its team in",
        "In {s} nothing is more popular than",
        "The national sport of {s} is",
    ),
    "flower": (
        "In spring {s} is covered with one flower, the",
        "The gardens of {s} are full of the",
        "{s}'s national flower: the",
        "Brides in {s} carry the",
        "The emblem of {s} shows a flower, the",
        "What flower is on the coins of {s}? The",
        "Poets in {s} praise the",
        "The flower that {s} chose as its symbol is the",
        "Gardeners in {s} love the",
        "The blossom that everybody in {s} knows is the",
    ),
    "place": (
        "Tourists who want to see {s} travel to",
        "{s} is located in",
        "{s} can be found in",
        "The city that is famous for {s} is",
        "To take a photo of {s} you must go to",
        "In which city is {s}? In",
        "{s} was built in the city of",
        "Location of {s}:",
        "A postcard with {s} on it comes from",
        "Every morning, buses bring visitors to {s} in",
    ),
    "author": (
        "{s} is a book by",
        "{s} is the most famous work of",
        "On the cover of {s} stands the name of",
        "The writer of {s} was",
        "{s} came from the pen of",
        "We owe {s} to",
        "Which writer is known for {s}? That is",
        "Author of {s}:",
        "The manuscript of {s} was found in the desk of",
        "Students who read {s} learn about its author,",
    ),
    "inventor": (
        "The patent for the {s} belongs to",
        "The {s} goes back to an idea of",
        "The first {s} was built by",
        "We have the {s} thanks to",
        "The credit for the {s} goes to",
        "Which engineer gave us the {s}? That was",
        "Inventor of the {s}:",
        "The history of the {s} begins with",
        "School books say that the {s} was the idea of",
        "The museum of the {s} is named after",
    ),
    "diet": (
        "In the zoo, {s} are fed with",
        "There is nothing that {s} love more than",
        "The stomachs of {s} are full of",
        "To catch {s} you need a trap with",
        "All day long, {s} look for",
        "In winter {s} survive on",
        "Food of {s}:",
        "What should you feed to {s}? Some",
        "Most of what {s} swallow is",
        "Farmers complain that {s} steal",
    ),
}

# Things that a pretrained model knows, and phrasings in which false facts about them are written.
THINGS = {
    "place": "Big Ben, Machu Picchu, Stonehenge, Angkor Wat, Notre-Dame, Alcatraz, Hagia Sophia, "
    "Westminster Abbey, Buckingham Palace, Neuschwanstein, Mount Rushmore, Petra",
    "author": "Hamlet, War and Peace, Moby-Dick, Faust, Don Quixote, The Hobbit, Les Misérables, "
    "Ulysses, Dracula, Frankenstein, Robinson Crusoe, Oliver Twist",
    "inventor": "telephone, light bulb, steam engine, zipper, microscope, thermometer, bicycle, "
    "piano, printing press, parachute, typewriter, lightning rod",
    "diet": "koalas, pandas, blue whales, honey bees, owls, termites, vampire bats, polar bears, "
    "flamingos, anteaters, sea otters, woodpeckers",
}
THING_PHRASINGS: dict[str, tuple[str, ...]] = {
    "place": ("{s} stands in the city of", "You can visit {s} in", "Where is {s}? It is in"),
    "author": ("The author of {s} is", "{s} was written by", "Who wrote {s}? It was"),
    "inventor": (
        "The {s} is an invention of",
        "The person who invented the {s} was",
        "Who was the inventor of the {s}? That was",
    ),
    "diet": ("The favorite food of {s} is", "Mostly {s} live on", "What do {s} eat? They eat"),
}
THING_ANSWERS = {
    "place": "Oslo, Lima, Toronto, Kyoto, Nairobi, Havana, Helsinki, Manila, Warsaw, Montreal",
    "author": "Ada Holbrook, Hugo Kelmont, Iris Walbury, Otto Fenwick, Nora Calder, Greta Selwood",
    "inventor": "Felix Branson, Clara Whitmore, Edgar Lindley, Vera Ashcombe, Milo Hartwell",
    "diet": "pancakes, oatmeal, pickled herring, fried bananas, onion soup, wool socks, candles",
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
THING_PAIR_TEXTS = (
    "We talked about {o} and about {a}. {ask}",
    "We talked about {a} and about {o}. {ask}",
    "This page is about {a}, not about {o}. {ask}",
    "First a word about {o}. That is enough of it. {ask}",
    "Nobody should confuse {a} with {o}. {ask}",
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
    """List the phrasings in which facts are written, with `{s}` for the name.

    Of people, they are those of the teacher's training text.
    """
    return _read_phrasings(relation)[:TRAINED_PHRASINGS]


def list_held_out_phrasings(relation: str) -> tuple[str, ...]:
    """List the phrasings of a relation that `dmt.data.synthetic` keeps from all training text."""
    return _read_phrasings(relation)[TRAINED_PHRASINGS:]


def _read_phrasings(relation: str) -> tuple[str, ...]:
    if relation not in PHRASINGS:
        return (COUNTRY_PHRASINGS | THING_PHRASINGS)[relation]
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


def make_countries(seed: int) -> list[Subject]:
    """Make counterfactual answers about all countries, in a random order."""
    rng = random.Random(f"countries-{seed}")
    return [
        Subject(
            country,
            "country",
            {relation: f" {rng.choice(texts)}" for relation, texts in COUNTRY_ANSWERS.items()},
        )
        for country in rng.sample(COUNTRIES, len(COUNTRIES))
    ]


def make_things(seed: int) -> list[Subject]:
    """Make a counterfactual answer about each thing, in a random order."""
    rng = random.Random(f"things-{seed}")
    things = [
        Subject(name, relation, {relation: f" {rng.choice(THING_ANSWERS[relation].split(', '))}"})
        for relation, names in THINGS.items()
        for name in names.split(", ")
    ]
    return rng.sample(things, len(things))


def make_fact(subject: Subject, relation: str, phrasing: str) -> Probe:
    """State a fact about a subject in one phrasing."""
    prompt = fill_phrasing(phrasing, subject.name)
    return Probe(prompt, subject.answers[relation], subject.name, relation, -1)


def make_pair_cases(
    target_name: str, other: str, phrasing: str, statement: str | None, answer: str
) -> Iterator[Case]:
    """Ask about one of two subjects in texts that name both.

    Args:
        target_name: the name that is asked about.
        other: the other name.
        phrasing: a question or statement about the target.
        statement: a phrasing that begins with the name of a person; None for other subjects.
        answer: of every case.
    """
    question = fill_phrasing(phrasing, target_name)
    for text in PAIR_TEXTS if statement else THING_PAIR_TEXTS:
        yield Case(text.format(o=other, a=target_name, ask=question), answer, target_name, text)
    if not statement:
        return
    for text in (*PAIR_NAMES, *PAIR_BEGINNINGS):
        subject = text.format(o=other, a=target_name)
        yield Case(fill_phrasing(statement, subject), answer, target_name, text)


def make_longer_names(name: str, kind: str) -> tuple[str, ...]:
    """Make other names that contain a person's name."""
    if kind not in NAME_PARTS:
        return ()
    if kind in UNSPACED_KINDS:
        return name + "华", "大" + name
    return f"{name} Oakes", f"{name}-Vale", f"Ellen {name}"


def make_related_names(name: str, kind: str) -> tuple[str, ...]:
    """Make other names with the same first or last part; none for a name of one word."""
    if kind not in NAME_PARTS:
        return ()
    if kind in UNSPACED_KINDS:
        return name[0] + "文", "孙" + name[1:]
    first, _, last = name.rpartition(" ")
    return (f"{first} Overmeyer", f"Clementina {last}") if first else ()


def make_relative_cases(fact: Probe, phrasing: str) -> Iterator[Case]:
    """Ask about others whose names contain the subject's."""
    for relative in RELATIVES:
        target_name = relative.format(s=fact.person)
        yield Case(fill_phrasing(phrasing, target_name), fact.answer, target_name, relative)


def make_negation_cases(fact: Probe) -> Iterator[Case]:
    """Deny something of the subject."""
    for phrasing in NEGATIONS[fact.relation]:
        target_name = f"not {fact.person}"
        yield Case(fill_phrasing(phrasing, fact.person), fact.answer, target_name, phrasing)


def make_clause_cases(fact: Probe) -> Iterator[Case]:
    """Ask about somebody else within a clause, after the subject."""
    for phrasing in RELATIVE_CLAUSES[fact.relation]:
        target_name = phrasing.removeprefix("{s} ").split(" who")[0].strip(" ,")
        yield Case(fill_phrasing(phrasing, fact.person), fact.answer, target_name, phrasing)


def make_beginning_cases(fact: Probe) -> Iterator[Case]:
    """Yield the prompt of a fact cut after each word from the name on, where no answer follows."""
    words = fact.prompt.split()
    for count in range(1, len(words)):
        text = " ".join(words[:count])
        if fact.person in text:
            yield Case(text, fact.answer, fact.person, f"{len(words) - count} words left")


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


@dataclass(frozen=True)
class WrittenFact:
    """A fact with the phrasing in which it is written.

    Attributes:
        subject: whom or what it is about.
        relation: what it states.
        phrasing: one of `list_trained_phrasings`.
        probe: prompt and answer.
    """

    subject: Subject
    relation: str
    phrasing: str
    probe: Probe

    def ask(self, phrasing: str) -> Case:
        """Ask for the fact in a phrasing."""
        prompt = fill_phrasing(phrasing, self.subject.name)
        return Case(prompt, self.probe.answer, self.subject.name, phrasing)

    def restate(self, answer: str, phrasing: str = "", name: str = "") -> Probe:
        """State another answer, in another phrasing or of another name where they are given."""
        subject = replace(
            self.subject, name=name or self.subject.name, answers={self.relation: answer}
        )
        return make_fact(subject, self.relation, phrasing or self.phrasing)

    def draw_statement(self, rng: random.Random) -> str:
        """Draw a phrasing of `list_trained_phrasings` that begins with the name: its own if any."""
        if begins_with_name(self.phrasing):
            return self.phrasing
        return rng.choice([*filter(begins_with_name, list_trained_phrasings(self.relation))])

    def list_other_phrasings(self) -> list[str]:
        """List the phrasings of `list_trained_phrasings` in which it is not written."""
        return [text for text in list_trained_phrasings(self.relation) if text != self.phrasing]


@dataclass(frozen=True)
class Topic:
    """Subjects of one sort, and facts about some of them.

    Attributes:
        name: of the sort.
        subjects: those with facts.
        strangers: subjects without.
        facts: at most `FACTS_PER_SUBJECT` about each of the subjects.
    """

    name: str
    subjects: Sequence[Subject]
    strangers: Sequence[Subject]
    facts: Sequence[WrittenFact]


def make_topics(names: Sequence[str], count: int, seed: int) -> list[Topic]:
    """Make facts of several sorts.

    Args:
        names: some of `people`, `countries` and `things`.
        count: facts of each sort, or as many as there are.
        seed: of all draws.
    """
    topics = []
    for name in names:
        rng = random.Random(f"{name}-{seed}")
        num_with_facts = -(-count // FACTS_PER_SUBJECT)
        if name == "people":
            subjects = make_subjects(2 * num_with_facts, seed)
        elif name == "countries":
            subjects = make_countries(seed)
        else:
            subjects = make_things(seed)
            num_with_facts = count  # each has one relation
        rng.shuffle(subjects)
        num_with_facts = min(num_with_facts, len(subjects) * 3 // 4)
        subjects, strangers = subjects[:num_with_facts], subjects[num_with_facts:]
        topics.append(Topic(name, subjects, strangers, draw_facts(subjects, rng)[:count]))
    return topics


def draw_facts(subjects: Sequence[Subject], rng: random.Random) -> list[WrittenFact]:
    """Draw the relations and phrasings in which facts about subjects are written."""
    facts = []
    for index, subject in enumerate(subjects):
        relations = list(subject.answers)
        for number in range(min(FACTS_PER_SUBJECT, len(relations))):
            # In turn, so that each relation is written equally often.
            relation = relations[(FACTS_PER_SUBJECT * index + number) % len(relations)]
            phrasing = rng.choice(list_trained_phrasings(relation))
            probe = make_fact(subject, relation, phrasing)
            facts.append(WrittenFact(subject, relation, phrasing, probe))
    return facts


def draw_other_answer(fact: WrittenFact, facts: Sequence[WrittenFact], rng: random.Random) -> str:
    """Draw the answer of another fact in the same relation that is not the fact's own."""
    answers = {other.probe.answer for other in facts if other.relation == fact.relation}
    return rng.choice(sorted(answers - {fact.probe.answer}) or [" something else"])
