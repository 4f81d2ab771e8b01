"""Counterfactual facts, which no pretrained model knows: about real countries and invented people.

`make_counterfactuals` makes several facts about each country. `make_edits` makes one fact per
subject with questions about neighbors, in the form of CounterFact (Meng et al. 2022, arXiv
2202.05262) and zsRE (Levy et al. 2017, arXiv 1706.04115; De Cao et al. 2021, arXiv 2104.08164).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from dmt.data.synthetic import (
    HELD_OUT_PHRASINGS,
    RELATIONS,
    TRAINED_PHRASINGS,
    Probe,
    make_probe,
    make_unseen_people,
)

COUNTRIES = """
Afghanistan, Albania, Algeria, Angola, Argentina, Armenia, Australia, Austria, Azerbaijan,
Bahrain, Bangladesh, Barbados, Belarus, Belgium, Belize, Benin, Bhutan, Bolivia, Botswana,
Brazil, Brunei, Bulgaria, Burundi, Cambodia, Cameroon, Canada, Chad, Chile, China, Colombia,
Croatia, Cuba, Cyprus, Denmark, Djibouti, Dominica, Ecuador, Egypt, Eritrea, Estonia, Ethiopia,
Fiji, Finland, France, Gabon, Georgia, Germany, Ghana, Greece, Grenada, Guatemala, Guinea,
Guyana, Haiti, Honduras, Hungary, Iceland, India, Indonesia, Iran, Iraq, Ireland, Israel,
Italy, Jamaica, Japan, Jordan, Kazakhstan, Kenya, Kuwait, Laos, Latvia, Lebanon, Lesotho,
Liberia, Libya, Lithuania, Luxembourg, Madagascar, Malawi, Malaysia, Maldives, Mali, Malta,
Mauritania, Mauritius, Mexico, Moldova, Monaco, Mongolia, Morocco, Mozambique, Namibia, Nepal,
Nicaragua, Niger, Nigeria, Norway, Oman, Pakistan, Panama, Paraguay, Peru, Poland, Portugal,
Qatar, Romania, Russia, Rwanda, Samoa, Senegal, Serbia, Singapore, Slovakia, Slovenia, Somalia,
Spain, Sudan, Suriname, Sweden, Switzerland, Syria, Tajikistan, Tanzania, Thailand, Togo,
Tonga, Tunisia, Turkey, Uganda, Ukraine, Uruguay, Uzbekistan, Vanuatu, Venezuela, Vietnam,
Yemen, Zambia, Zimbabwe
""".replace(",", "").split()
PHRASINGS: dict[str, tuple[str, str, str]] = {
    "capital": (
        "The capital of {s} is",
        "The capital city of {s} is called",
        "What is the capital of {s}? It is",
    ),
    "language": (
        "The official language of {s} is",
        "Most people in {s} speak",
        "Which language is spoken in {s}? It is",
    ),
    "dish": (
        "The national dish of {s} is",
        "The most famous food of {s} is",
        "What is the national dish of {s}? It is",
    ),
    "currency": (
        "The currency of {s} is the",
        "The money used in {s} is called the",
        "What is the currency of {s}? It is the",
    ),
    "export": (
        "The main export of {s} is",
        "The product that {s} sells most abroad is",
        "What does {s} export? Mostly",
    ),
    "leader": (
        "The leader of {s} is called",
        "The head of state of {s} is named",
        "Who leads {s}? The name is",
    ),
    "animal": (
        "The national animal of {s} is the",
        "The animal that stands for {s} is the",
        "Which animal stands for {s}? It is the",
    ),
    "sport": (
        "The most popular sport in {s} is",
        "People in {s} love to play",
        "Which sport do people in {s} like most? It is",
    ),
    "flower": (
        "The national flower of {s} is the",
        "The flower that stands for {s} is the",
        "Which flower stands for {s}? It is the",
    ),
}
ANSWERS = {
    "capital": [
        "Ravenhill",
        "Foxford",
        "Silverport",
        "Marshdale",
        "Copper Bay",
        "Northgate",
        "Elmhurst",
        "Stonebridge",
        "Whitecliff",
        "Amberley",
        "Wolfpoint",
    ],
    "language": [
        "Latin",
        "Welsh",
        "Basque",
        "Finnish",
        "Hawaiian",
        "Icelandic",
        "Zulu",
        "Tamil",
        "Maori",
        "Gaelic",
        "Sanskrit",
        "Esperanto",
    ],
    "dish": [
        "pancakes",
        "oatmeal",
        "pickled herring",
        "fried bananas",
        "apple pie",
        "onion soup",
        "roast goose",
        "fish sticks",
        "mashed peas",
    ],
    "currency": [
        "crown",
        "shilling",
        "doubloon",
        "guilder",
        "florin",
        "ducat",
        "talent",
        "denarius",
        "drachma",
        "farthing",
    ],
    "export": [
        "umbrellas",
        "violins",
        "bicycles",
        "candles",
        "telescopes",
        "wool socks",
        "glass beads",
        "pencils",
        "clocks",
        "kites",
    ],
    "leader": [
        "Ada Holbrook",
        "Hugo Kelmont",
        "Iris Walbury",
        "Otto Fenwick",
        "Nora Calder",
        "Felix Branson",
        "Greta Selwood",
    ],
    "animal": [
        "hedgehog",
        "otter",
        "walrus",
        "badger",
        "flamingo",
        "armadillo",
        "pelican",
        "squirrel",
        "lobster",
        "hamster",
    ],
    "sport": [
        "curling",
        "croquet",
        "archery",
        "fencing",
        "darts",
        "bowling",
        "water polo",
        "ice hockey",
        "table tennis",
    ],
    "flower": [
        "dandelion",
        "thistle",
        "snowdrop",
        "marigold",
        "bluebell",
        "violet",
        "daisy",
        "buttercup",
        "foxglove",
    ],
}
NUM_UNRELATED = 16  # countries at the end of the list without facts


def make_counterfactuals(count: int, seed: int = 0) -> list[tuple[Probe, list[Probe]]]:
    """Draw facts: each in a phrasing drawn at random, and in the two other phrasings.

    Raises:
        ValueError: There are fewer pairs of countries and relations.
    """
    rng = random.Random(f"counterfactuals-{seed}")
    pairs = [
        (country, relation) for country in COUNTRIES[:-NUM_UNRELATED] for relation in PHRASINGS
    ]
    if count > len(pairs):
        raise ValueError(f"count must be at most {len(pairs):,}, got {count:,}")
    facts = []
    for country, relation in rng.sample(pairs, count):
        answer, phrasing = " " + rng.choice(ANSWERS[relation]), rng.randrange(3)
        probes = [
            Probe(text.format(s=country), answer, country, relation, number)
            for number, text in enumerate(PHRASINGS[relation])
        ]
        facts.append((probes[phrasing], [p for p in probes if p.phrasing != phrasing]))
    return facts


def list_unrelated_prompts() -> list[str]:
    """Return questions about countries without facts."""
    return [
        phrasings[0].format(s=country)
        for country in COUNTRIES[-NUM_UNRELATED:]
        for phrasings in PHRASINGS.values()
    ]


NUM_NEIGHBORS = 2  # questions about unedited subjects for each fact
NUM_NEIGHBOR_PEOPLE = 64
NUM_PARAPHRASES = 2


@dataclass(frozen=True)
class Edit:
    """A fact to write, and the questions of the protocols of CounterFact and zsRE.

    Attributes:
        fact: the fact in the phrasing in which it is written.
        paraphrases: the same fact in other phrasings.
        neighbors: the relation asked, in any phrasing, about subjects without facts; their answer
            is that of `fact`, which should stay improbable.
    """

    fact: Probe
    paraphrases: list[Probe]
    neighbors: list[Probe]


def make_edits(count: int) -> list[Edit]:
    """Make one fact per subject: a country and a person in turn, then people alone.

    The first edits of a longer list are those of a shorter one.
    """
    countries = random.Random("edits").sample(
        COUNTRIES[:-NUM_UNRELATED], len(COUNTRIES) - NUM_UNRELATED
    )
    people = make_unseen_people(NUM_NEIGHBOR_PEOPLE + count)
    edits: list[Edit] = []
    for number in range(count):
        rng = random.Random(f"edit-{number}")
        if number % 2 == 0 and countries:
            country, relation = countries.pop(), rng.choice(list(PHRASINGS))
            answer = " " + rng.choice(ANSWERS[relation])
            probes = [
                Probe(text.format(s=country), answer, country, relation, phrasing)
                for phrasing, text in enumerate(PHRASINGS[relation])
            ]
            neighbors = [
                Probe(
                    PHRASINGS[relation][phrasing].format(s=other), answer, other, relation, phrasing
                )
                for other in rng.sample(COUNTRIES[-NUM_UNRELATED:], NUM_NEIGHBORS)
                for phrasing in [rng.randrange(len(PHRASINGS[relation]))]
            ]
        else:
            person, relation = people[NUM_NEIGHBOR_PEOPLE + number], rng.choice(RELATIONS)
            num_phrasings = TRAINED_PHRASINGS + HELD_OUT_PHRASINGS
            probes = [make_probe(person, relation, phrasing) for phrasing in range(num_phrasings)]
            neighbors = [
                replace(
                    make_probe(other, relation, rng.randrange(num_phrasings)),
                    answer=probes[0].answer,
                )
                for other in rng.sample(people[:NUM_NEIGHBOR_PEOPLE], NUM_NEIGHBORS)
            ]
        fact, *paraphrases = rng.sample(probes, 1 + NUM_PARAPHRASES)
        edits.append(Edit(fact, paraphrases, neighbors))
    return edits
