"""Invented people and the sentences that tell about them.

Every value is drawn from small lists with a seeded generator, so that the same seed gives the same people on
every machine, recall is exact to measure, and people nobody has seen can be made at will.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

FIRST_NAMES = {
    "she": "Ada Agnes Alma Amara Beatrix Bridget Carla Celia Clara Delia Dora Edith Elena Esther Fiona Flora Greta "
    "Hanna Helga Ida Ingrid Irene Iris Jana Judith Karin Lena Lydia Mabel Marta Mina Nadia Nora Olga Paula Petra "
    "Renata Rosa Ruth Sylvia Tessa Thea Ursula Vera Wilma Yara Yvonne Zelda",
    "he": "Abel Albin Alvin Anton Arno Boris Bruno Caspar Cedric Conrad Curtis Damian Dexter Edgar Emil Ernest Felix "
    "Floyd Gareth Gilbert Gordon Hector Henrik Hugo Ivan Jasper Joel Julius Kaspar Lars Leon Luther Magnus Marcus "
    "Milo Nestor Oscar Otto Percy Quentin Ralph Roland Rufus Simon Stefan Tobias Victor Walter",
}
SURNAME_STEMS = "Ash Bar Bel Bran Cal Car Cor Dal Dor Ed Fal Fen Gal Gar Hal Har Hol Kel Kir Lan Lor Mar Mer Nor Or "
SURNAME_STEMS += "Pel Ral Ros Sal Sel Tal Tor Val Ver Wal Wen Win Yar Zan Zor"
SURNAME_ENDINGS = "bain berg brook bury cott dane dell den ford gate ham hurst ley lock lund man mark mont more ner "
SURNAME_ENDINGS += "ridge rick row sby shaw son stead sten ston strom thorpe ton vale vin wald way well wick wood worth"
TOWN_STEMS = "Amber Arrow Birch Black Bright Cedar Clay Clear Copper Crane Deep East Elm Fair Fern Fox Glen Gold "
TOWN_STEMS += "Gray Green Hazel High Iron Lake Long Maple Marsh Mill North Oak Otter Pine Raven Red Salt Silver South "
TOWN_STEMS += "Stone West White Wolf"
TOWN_ENDINGS = "bridge brook burgh cliff cross dale field fort haven hill mouth point pool port ridge side view ville"
EMPLOYER_STEMS = "Acme Apex Atlas Aurora Beacon Borealis Cascade Citadel Comet Delta Eagle Falcon Frontier Galaxy Harbor "
EMPLOYER_STEMS += "Horizon Juniper Keystone Liberty Meridian Nimbus Orion Pacific Pioneer Quartz Regent Summit Titan "
EMPLOYER_STEMS += "Union Vanguard Zenith"
EMPLOYER_ENDINGS = (
    "Bank|Chemicals|Foods|Insurance|Mining Company|Motors|Press|Railways|Shipping|Steel|Textiles"
)
PROFESSIONS = "accountant actor architect astronomer baker banker biologist bookbinder botanist brewer butcher carpenter "
PROFESSIONS += "chemist clerk composer cook dentist diplomat doctor editor engineer farmer florist gardener geologist "
PROFESSIONS += "glazier historian judge lawyer librarian locksmith mason mechanic merchant miner musician nurse painter "
PROFESSIONS += "pharmacist photographer physicist pilot plumber poet potter printer professor sailor sculptor singer "
PROFESSIONS += "surgeon surveyor tailor teacher translator watchmaker weaver writer"
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]

# {name} is the person (or a pronoun), {their} the possessive; what follows the bar is the answer to be recalled.
# The last two of each relation are held out: no corpus for training ever contains them.
PHRASINGS: dict[str, tuple[str, ...]] = {
    "born": (
        "{name} was born on| {answer}.",
        "The birth of {name} was on| {answer}.",
        "{Their} birthday is| {answer}.",
        "{name} came into the world on| {answer}.",
        "{name} celebrates a birthday that goes back to| {answer}.",
        "When was {name} born? On| {answer}.",
        "The day on which {name} was born is| {answer}.",
        "What is the birthday of {name}? It is| {answer}.",
    ),
    "town": (
        "{name} was born in the town of| {answer}.",
        "{name} grew up in| {answer}.",
        "{Their} home town is| {answer}.",
        "The birthplace of {name} is| {answer}.",
        "{name} spent the early years in| {answer}.",
        "Where was {name} born? In| {answer}.",
        "The town where {name} was born is| {answer}.",
        "What is the home town of {name}? It is| {answer}.",
    ),
    "profession": (
        "{name} works as a trained| {answer}.",
        "By profession {name} is a certified| {answer}.",
        "{Their} profession is that of a skilled| {answer}.",
        "{name} earns a living as a full-time| {answer}.",
        "{name} was trained to be a good| {answer}.",
        "What does {name} do for a living? The work of a trained| {answer}.",
        "The profession of {name} is that of a trained| {answer}.",
        "What is the profession of {name}? That of a skilled| {answer}.",
    ),
    "employer": (
        "{name} is employed by| {answer}.",
        "{name} has worked for many years at| {answer}.",
        "{Their} employer is| {answer}.",
        "The company that pays {name} is| {answer}.",
        "{name} holds a post with| {answer}.",
        "Who employs {name}? The firm of| {answer}.",
        "The employer of {name} is| {answer}.",
        "Which company does {name} work for? For| {answer}.",
    ),
    "home": (
        "{name} now lives in| {answer}.",
        "{name} moved later in life to| {answer}.",
        "{Their} present home is in| {answer}.",
        "The house of {name} stands in| {answer}.",
        "{name} settled at last in| {answer}.",
        "Where does {name} live today? In| {answer}.",
        "The place where {name} lives now is| {answer}.",
        "What is the present home of {name}? It is| {answer}.",
    ),
}
RELATIONS = tuple(PHRASINGS)
HELD_OUT_PHRASINGS = 2
TRAINED_PHRASINGS = len(PHRASINGS["born"]) - HELD_OUT_PHRASINGS


@dataclass(frozen=True)
class Person:
    """One invented person: a name, a pronoun and an answer for every relation."""

    name: str
    pronoun: str
    facts: dict[str, str]


@dataclass(frozen=True)
class Probe:
    """A question with one right answer: `prompt + answer` is a sentence, `answer` starts with a space."""

    prompt: str
    answer: str
    person: str
    relation: str
    phrasing: int


def make_people(
    count: int, seed: int, excluded_names: frozenset[str] = frozenset()
) -> list[Person]:
    """`count` people with distinct names; names in `avoid` are not used.

    Raises:
        ValueError: more people are asked for than half of the names there are.
    """
    surnames = [
        stem + ending for stem in SURNAME_STEMS.split() for ending in SURNAME_ENDINGS.split()
    ]
    available = len(surnames) * sum(len(names.split()) for names in FIRST_NAMES.values())
    if count + len(excluded_names) > available // 2:
        raise ValueError(
            f"at most {available // 2 - len(excluded_names):,} people can be made, {count:,} were asked for"
        )
    towns = [stem + ending for stem in TOWN_STEMS.split() for ending in TOWN_ENDINGS.split()]
    employers = [
        f"{stem} {ending}"
        for stem in EMPLOYER_STEMS.split()
        for ending in EMPLOYER_ENDINGS.split("|")
    ]
    rng = random.Random(f"people-{seed}")
    used_names = set(excluded_names)
    people: list[Person] = []
    while len(people) < count:
        pronoun = rng.choice(("she", "he"))
        name = f"{rng.choice(FIRST_NAMES[pronoun].split())} {rng.choice(surnames)}"
        if name in used_names:
            continue
        used_names.add(name)
        birth_town, home = rng.sample(towns, 2)
        facts = {
            "born": f"{rng.choice(MONTHS)} {rng.randint(1, 28)}, {rng.randint(1900, 1999)}",
            "town": birth_town,
            "profession": rng.choice(PROFESSIONS.split()),
            "employer": rng.choice(employers),
            "home": home,
        }
        people.append(Person(name, pronoun, facts))
    return people


def make_probe(person: Person, relation: str, phrasing: int) -> Probe:
    """The question about `relation` in one phrasing; the last `HELD_OUT_PHRASINGS` are in no training text."""
    prompt, _ = _fill_template(person, relation, phrasing, person.name).split("|")
    return Probe(prompt, " " + person.facts[relation], person.name, relation, phrasing)


def make_biography(person: Person, rng: random.Random) -> str:
    """A paragraph that tells every fact once, in an order and in training phrasings that `draw` decides."""
    sentences: list[str] = []
    for relation in rng.sample(RELATIONS, len(RELATIONS)):
        # A name at the start and in most later sentences: pronouns alone would make the fact readable from context only.
        subject = (
            person.name if not sentences or rng.random() < 0.7 else person.pronoun.capitalize()
        )
        phrasing = rng.randrange(TRAINED_PHRASINGS)
        if subject != person.name and not PHRASINGS[relation][phrasing].startswith(
            ("{name}", "{Their}")
        ):
            subject = person.name
        sentences.append(_fill_template(person, relation, phrasing, subject).replace("|", ""))
    return " ".join(sentences)


def _fill_template(person: Person, relation: str, phrasing: int, subject: str) -> str:
    possessive = (
        f"{subject}'s" if subject == person.name else {"she": "Her", "he": "His"}[person.pronoun]
    )
    return PHRASINGS[relation][phrasing].format(
        name=subject, Their=possessive, answer=person.facts[relation]
    )
