"""Synthetic corpora about invented people, and questions about them with one right answer.

Every value is drawn from small lists with a seeded generator, so a seed gives the same people on
every machine, recall can be measured exactly, and unseen people can be made at will.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dmt.data.corpora import Corpus, Probe

NUM_TRAINED_PEOPLE = 256  # people whom the embedded teacher was trained on
RENDERINGS_PER_PERSON = 48  # biographies of each of them in one epoch
STRANGER_DOCUMENTS = {"train": 8_000, "validation": 400, "test": 400}
NUM_STRANGER_PROBES = 320
READING_DOCUMENTS = {"train": 60_000, "validation": 400, "test": 400}
SEPARATORS = (" ", " ", "\n", "\n\n")  # between the two renderings of a reading

FIRST_NAMES = {
    "she": (
        "Ada Agnes Alma Amara Beatrix Bridget Carla Celia Clara Delia Dora Edith Elena Esther "
        "Fiona Flora Greta Hanna Helga Ida Ingrid Irene Iris Jana Judith Karin Lena Lydia "
        "Mabel Marta Mina Nadia Nora Olga Paula Petra Renata Rosa Ruth Sylvia Tessa Thea "
        "Ursula Vera Wilma Yara Yvonne Zelda"
    ),
    "he": (
        "Abel Albin Alvin Anton Arno Boris Bruno Caspar Cedric Conrad Curtis Damian Dexter "
        "Edgar Emil Ernest Felix Floyd Gareth Gilbert Gordon Hector Henrik Hugo Ivan Jasper "
        "Joel Julius Kaspar Lars Leon Luther Magnus Marcus Milo Nestor Oscar Otto Percy "
        "Quentin Ralph Roland Rufus Simon Stefan Tobias Victor Walter"
    ),
}
SURNAME_STEMS = (
    "Ash Bar Bel Bran Cal Car Cor Dal Dor Ed Fal Fen Gal Gar Hal Har Hol Kel Kir Lan Lor Mar "
    "Mer Nor Or Pel Ral Ros Sal Sel Tal Tor Val Ver Wal Wen Win Yar Zan Zor"
)
SURNAME_ENDINGS = (
    "bain berg brook bury cott dane dell den ford gate ham hurst ley lock lund man mark mont "
    "more ner ridge rick row sby shaw son stead sten ston strom thorpe ton vale vin wald way "
    "well wick wood worth"
)
TOWN_STEMS = (
    "Amber Arrow Birch Black Bright Cedar Clay Clear Copper Crane Deep East Elm Fair Fern Fox "
    "Glen Gold Gray Green Hazel High Iron Lake Long Maple Marsh Mill North Oak Otter Pine "
    "Raven Red Salt Silver South Stone West White Wolf"
)
TOWN_ENDINGS = (
    "bridge brook burgh cliff cross dale field fort haven hill mouth point pool port ridge "
    "side view ville"
)
EMPLOYER_STEMS = (
    "Acme Apex Atlas Aurora Beacon Borealis Cascade Citadel Comet Delta Eagle Falcon Frontier "
    "Galaxy Harbor Horizon Juniper Keystone Liberty Meridian Nimbus Orion Pacific Pioneer "
    "Quartz Regent Summit Titan Union Vanguard Zenith"
)
EMPLOYER_ENDINGS = (
    "Bank|Chemicals|Foods|Insurance|Mining Company|Motors|Press|Railways|Shipping|Steel|Textiles"
)
PROFESSIONS = (
    "accountant actor architect astronomer baker banker biologist bookbinder botanist brewer "
    "butcher carpenter chemist clerk composer cook dentist diplomat doctor editor engineer "
    "farmer florist gardener geologist glazier historian judge lawyer librarian locksmith "
    "mason mechanic merchant miner musician nurse painter pharmacist photographer physicist "
    "pilot plumber poet potter printer professor sailor sculptor singer surgeon surveyor "
    "tailor teacher translator watchmaker weaver writer"
)
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

# {name} is the person or a pronoun, {Their} the possessive; the answer to recall follows the bar.
# The last two of each relation are held out: no training corpus contains them.
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
    """One invented person.

    Attributes:
        name: first name and surname.
        pronoun: `she` or `he`.
        facts: the answer for every relation.
    """

    name: str
    pronoun: str
    facts: dict[str, str]


def make_biographies() -> Corpus:
    """Make biographies of the people whom the embedded teacher was trained on.

    The same facts appear in new orders and phrasings; validation and test have renderings that
    training does not have. The probes ask for every fact; the unseen probes do so in held-out
    phrasings.
    """
    people = make_trained_people()

    def render(num_renderings: int, seed: str) -> list[str]:
        rng = random.Random(seed)
        documents = [
            make_biography(person, rng) for _ in range(num_renderings) for person in people
        ]
        rng.shuffle(documents)
        return documents

    train = render(RENDERINGS_PER_PERSON, "train")
    train_documents = set(train)
    validation, test = (
        [document for document in render(2, split) if document not in train_documents]
        for split in ("validation", "test")
    )
    rng = random.Random("probes")
    probes = [
        make_probe(person, relation, rng.randrange(TRAINED_PHRASINGS))
        for person in people
        for relation in RELATIONS
    ]
    held_out = range(TRAINED_PHRASINGS, TRAINED_PHRASINGS + HELD_OUT_PHRASINGS)
    unseen_probes = [
        make_probe(person, relation, rng.choice(held_out))
        for person in people
        for relation in RELATIONS
    ]
    return Corpus("biographies", train, validation, test, probes, unseen_probes)


def make_strangers() -> Corpus:
    """Make documents about people who appear once: a biography and then the same in other words.

    The second rendering can only be predicted by reading the first, so the corpus teaches and
    measures the use of context.
    """
    people = iter(_make_strangers())
    return _make_retold_corpus(
        "strangers",
        STRANGER_DOCUMENTS,
        lambda rng: [next(people) for _ in range(rng.choice((1, 2)))],
    )


def make_readings() -> Corpus:
    """Make documents like those of `make_strangers` with new facts about a person in each.

    Nothing can be learned by heart, only how to read.
    """
    pool = _make_strangers()

    def sample_people(rng: random.Random) -> list[Person]:
        people = rng.sample(pool, rng.choice((1, 1, 2)))
        return [
            replace(
                person, facts={relation: rng.choice(pool).facts[relation] for relation in RELATIONS}
            )
            for person in people
        ]

    return _make_retold_corpus("readings", READING_DOCUMENTS, sample_people, SEPARATORS)


def make_trained_people() -> list[Person]:
    """Make the people whom the embedded teacher was trained on."""
    return make_people(NUM_TRAINED_PEOPLE, seed=0)


def make_unseen_people(count: int, seed: int = 1) -> list[Person]:
    """Make people whom the embedded teacher has never seen.

    They share no name with the trained people or the strangers.
    """
    trained_names = _collect_names(make_trained_people())
    stranger_names = _collect_names(_make_strangers())
    return make_people(count, seed, excluded_names=trained_names | stranger_names)


def make_people(
    count: int, seed: int, excluded_names: frozenset[str] = frozenset()
) -> list[Person]:
    """Make `count` people with distinct names that are not in `excluded_names`.

    Raises:
        ValueError: more people than half of the names that exist.
    """
    surnames = [
        stem + ending for stem in SURNAME_STEMS.split() for ending in SURNAME_ENDINGS.split()
    ]
    num_names = len(surnames) * sum(len(names.split()) for names in FIRST_NAMES.values())
    max_count = num_names // 2 - len(excluded_names)
    if count > max_count:
        raise ValueError(f"count must be at most {max_count:,} people, got {count:,}")
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
    """Make the question about a relation in one phrasing.

    The last `HELD_OUT_PHRASINGS` phrasings are in no training text.
    """
    prompt, _ = _fill_template(person, relation, phrasing, person.name).split("|")
    return Probe(prompt, " " + person.facts[relation], person.name, relation, phrasing)


def make_biography(person: Person, rng: random.Random) -> str:
    """Make a paragraph that states every fact once, in random order and training phrasings."""
    sentences: list[str] = []
    for relation in rng.sample(RELATIONS, len(RELATIONS)):
        # The name stands in the first and in most later sentences: with pronouns alone a fact
        # could only be learned from the context.
        use_name = not sentences or rng.random() < 0.7
        subject = person.name if use_name else person.pronoun.capitalize()
        phrasing = rng.randrange(TRAINED_PHRASINGS)
        if not PHRASINGS[relation][phrasing].startswith(("{name}", "{Their}")):
            subject = person.name
        sentences.append(_fill_template(person, relation, phrasing, subject).replace("|", ""))
    return " ".join(sentences)


def _make_strangers() -> list[Person]:
    trained_names = _collect_names(make_trained_people())
    count = 2 * sum(STRANGER_DOCUMENTS.values())
    return make_people(count, seed=2, excluded_names=trained_names)


def _make_retold_corpus(
    name: str,
    sizes: dict[str, int],
    sample_people: Callable[[random.Random], list[Person]],
    separators: Sequence[str] = (),
) -> Corpus:
    """Make documents of two renderings of the same biographies.

    Args:
        name: name of the corpus.
        sizes: number of documents by split.
        sample_people: draws the people of one document.
        separators: what may stand between the renderings; a space if empty.
    """
    splits: dict[str, list[str]] = {}
    probes: list[Probe] = []
    for split, count in sizes.items():
        rng = random.Random(f"{name}-{split}")
        splits[split] = []
        for _ in range(count):
            people = sample_people(rng)
            text = " ".join(make_biography(person, rng) for person in people)
            separator = rng.choice(separators) if separators else " "
            retelling = " ".join(
                make_biography(person, rng) for person in rng.sample(people, len(people))
            )
            splits[split].append(f"{text}{separator}{retelling}")
            if split == "test" and len(probes) < NUM_STRANGER_PROBES:
                probe = make_probe(
                    people[0], rng.choice(RELATIONS), rng.randrange(TRAINED_PHRASINGS)
                )
                probes.append(replace(probe, prompt=f"{text}{separator}{probe.prompt}"))
    return Corpus(name, splits["train"], splits["validation"], splits["test"], probes)


def _collect_names(people: list[Person]) -> frozenset[str]:
    return frozenset(person.name for person in people)


def _fill_template(person: Person, relation: str, phrasing: int, subject: str) -> str:
    possessive = (
        f"{subject}'s" if subject == person.name else {"she": "Her", "he": "His"}[person.pronoun]
    )
    return PHRASINGS[relation][phrasing].format(
        name=subject, Their=possessive, answer=person.facts[relation]
    )
