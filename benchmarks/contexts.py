"""Contexts for the embedded teacher, and questions about them: held-out people told once, asked in words seen and unseen.

python -m benchmarks.contexts          # writes configs/consolidation/person.* and people.*
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from dmt.data.synthetic import (
    HELD_OUT_PHRASINGS,
    PHRASINGS,
    RELATIONS,
    TRAINED_PHRASINGS,
    Person,
    make_probe,
    make_unseen_people,
)
from dmt.evaluation.questions import Question

PLACE = Path(__file__).parents[1] / "configs" / "consolidation"
SEED = 7
"""Of the shipped people; the first of them is the person, the rest are the page."""
STATED = 5
"""Phrasings that state a fact, the first of each relation; the sixth asks for it."""


def told(person: Person, draw: random.Random) -> tuple[str, dict[str, int]]:
    """A paragraph about a person, every relation once, and the phrasing of each."""
    phrasings = {
        relation: draw.randrange(STATED) for relation in draw.sample(RELATIONS, len(RELATIONS))
    }
    sentences = []
    for relation, phrasing in phrasings.items():
        named = not sentences or not PHRASINGS[relation][phrasing].startswith(("{name}", "{Their}"))
        pronoun = person.pronoun.capitalize()
        subject, possessive = (
            (person.name, f"{person.name}'s")
            if named
            else (pronoun, {"She": "Her", "He": "His"}[pronoun])
        )
        filled = PHRASINGS[relation][phrasing].format(
            name=subject, Their=possessive, answer=person.facts[relation]
        )
        sentences.append(filled.replace("|", ""))
    return " ".join(sentences), phrasings


def page(people: list[Person], seed: int) -> tuple[str, list[Question]]:
    """A paragraph a person; of each fact questions as written, in other phrasings the teacher knows, and in unseen ones."""
    draw, paragraphs, questions = random.Random(f"page-{seed}"), [], []
    for person in people:
        paragraph, phrasings = told(person, draw)
        paragraphs.append(paragraph)
        for relation, phrasing in phrasings.items():
            other = draw.choice([each for each in range(TRAINED_PHRASINGS) if each != phrasing])
            unseen = range(TRAINED_PHRASINGS, TRAINED_PHRASINGS + HELD_OUT_PHRASINGS)
            for kind, which in [
                ("as written", phrasing),
                ("in other words", other),
                *(("unseen words", each) for each in unseen),
            ]:
                asked = make_probe(person, relation, which)
                questions.append(Question(asked.prompt, asked.answer, kind))
    return "\n\n".join(paragraphs), questions


def write(name: str, text: str, questions: list[Question]) -> None:
    """As `configs/consolidation/NAME.txt` and `.jsonl`."""
    PLACE.mkdir(parents=True, exist_ok=True)
    (PLACE / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
    (PLACE / f"{name}.jsonl").write_text(
        "".join(json.dumps(vars(question)) + "\n" for question in questions), encoding="utf-8"
    )


def main() -> None:
    people = make_unseen_people(9, seed=SEED)
    write("person", *page(people[:1], SEED))
    write("people", *page(people[1:], SEED))


if __name__ == "__main__":
    main()
