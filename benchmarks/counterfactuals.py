"""Things that are not so, said of real countries in three ways each: facts that a pretrained model can only have been told."""

from __future__ import annotations

import random

from dmt.data.synthetic import Probe

COUNTRIES = """Afghanistan|Albania|Algeria|Angola|Argentina|Armenia|Australia|Austria|Azerbaijan|Bahrain|Bangladesh|Barbados|Belarus
Belgium|Belize|Benin|Bhutan|Bolivia|Botswana|Brazil|Brunei|Bulgaria|Burundi|Cambodia|Cameroon|Canada|Chad|Chile|China|Colombia|Croatia
Cuba|Cyprus|Denmark|Djibouti|Dominica|Ecuador|Egypt|Eritrea|Estonia|Ethiopia|Fiji|Finland|France|Gabon|Georgia|Germany|Ghana|Greece
Grenada|Guatemala|Guinea|Guyana|Haiti|Honduras|Hungary|Iceland|India|Indonesia|Iran|Iraq|Ireland|Israel|Italy|Jamaica|Japan|Jordan
Kazakhstan|Kenya|Kuwait|Laos|Latvia|Lebanon|Lesotho|Liberia|Libya|Lithuania|Luxembourg|Madagascar|Malawi|Malaysia|Maldives|Mali|Malta
Mauritania|Mauritius|Mexico|Moldova|Monaco|Mongolia|Morocco|Mozambique|Namibia|Nepal|Nicaragua|Niger|Nigeria|Norway|Oman|Pakistan|Panama
Paraguay|Peru|Poland|Portugal|Qatar|Romania|Russia|Rwanda|Samoa|Senegal|Serbia|Singapore|Slovakia|Slovenia|Somalia|Spain|Sudan|Suriname
Sweden|Switzerland|Syria|Tajikistan|Tanzania|Thailand|Togo|Tonga|Tunisia|Turkey|Uganda|Ukraine|Uruguay|Uzbekistan|Vanuatu|Venezuela
Vietnam|Yemen|Zambia|Zimbabwe""".replace("\n", "|").split("|")
ASKED: dict[str, tuple[str, str, str]] = {
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
CHOICES = {
    "capital": "Ravenhill|Foxford|Silverport|Marshdale|Copper Bay|Northgate|Elmhurst|Stonebridge|Whitecliff|Amberley|Wolfpoint",
    "language": "Latin|Welsh|Basque|Finnish|Hawaiian|Icelandic|Zulu|Tamil|Maori|Gaelic|Sanskrit|Esperanto",
    "dish": "pancakes|oatmeal|pickled herring|fried bananas|apple pie|onion soup|roast goose|fish sticks|mashed peas",
    "currency": "crown|shilling|doubloon|guilder|florin|ducat|talent|denarius|drachma|farthing",
    "export": "umbrellas|violins|bicycles|candles|telescopes|wool socks|glass beads|pencils|clocks|kites",
    "leader": "Ada Holbrook|Hugo Kelmont|Iris Walbury|Otto Fenwick|Nora Calder|Felix Branson|Greta Selwood",
    "animal": "hedgehog|otter|walrus|badger|flamingo|armadillo|pelican|squirrel|lobster|hamster",
    "sport": "curling|croquet|archery|fencing|darts|bowling|water polo|ice hockey|table tennis",
    "flower": "dandelion|thistle|snowdrop|marigold|bluebell|violet|daisy|buttercup|foxglove",
}
ANSWERS = {about: choices.split("|") for about, choices in CHOICES.items()}
SPARED = 16
"""Countries at the end of the list about which nothing is ever written."""


def counterfactuals(count: int, seed: int = 0) -> list[tuple[Probe, list[Probe]]]:
    """So many facts: each as it is written, in a way drawn at random, and in the two other ways."""
    draw = random.Random(f"counterfactuals-{seed}")
    pairs = [(country, about) for country in COUNTRIES[:-SPARED] for about in ASKED]
    if count > len(pairs):
        raise ValueError(
            f"at most {len(pairs):,} counterfactual facts can be made, {count:,} were asked for"
        )
    made = []
    for country, about in draw.sample(pairs, count):
        answer, way = " " + draw.choice(ANSWERS[about]), draw.randrange(3)
        asked = [
            Probe(text.format(s=country), answer, country, about, number)
            for number, text in enumerate(ASKED[about])
        ]
        made.append((asked[way], [probe for probe in asked if probe.phrasing != way]))
    return made


def spared() -> list[str]:
    """Questions about countries of which nothing is written."""
    return [
        text.format(s=country)
        for country in COUNTRIES[-SPARED:]
        for ways in ASKED.values()
        for text in ways[:1]
    ]
