"""Write contexts about invented people for the embedded teacher, and questions about them.

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

FOLDER = Path(__file__).parents[1] / "configs" / "consolidation"
SEED = 7  # of the shipped people; the first is the person, the rest are the page
STATED = 5  # phrasings of a relation that state a fact; the sixth asks for it


def write_paragraph(person: Person, rng: random.Random) -> tuple[str, dict[str, int]]:
    """Return a paragraph with every relation of a person, and the phrasing of each."""
    phrasings = {
        relation: rng.randrange(STATED) for relation in rng.sample(RELATIONS, len(RELATIONS))
    }
    sentences: list[str] = []
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


def make_page(people: list[Person], seed: int) -> tuple[str, list[Question]]:
    """Return a paragraph per person, and questions in stated, trained and unseen phrasings."""
    rng, paragraphs, questions = random.Random(f"page-{seed}"), [], []
    for person in people:
        paragraph, phrasings = write_paragraph(person, rng)
        paragraphs.append(paragraph)
        for relation, phrasing in phrasings.items():
            other = rng.choice(
                [number for number in range(TRAINED_PHRASINGS) if number != phrasing]
            )
            unseen = range(TRAINED_PHRASINGS, TRAINED_PHRASINGS + HELD_OUT_PHRASINGS)
            for question_type, number in [
                ("as written", phrasing),
                ("in other words", other),
                *(("unseen words", unseen_number) for unseen_number in unseen),
            ]:
                probe = make_probe(person, relation, number)
                questions.append(Question(probe.prompt, probe.answer, question_type))
    return "\n\n".join(paragraphs), questions


def write(name: str, text: str, questions: list[Question]) -> None:
    """Write `configs/consolidation/NAME.txt` and `NAME.jsonl`."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
    (FOLDER / f"{name}.jsonl").write_text(
        "".join(json.dumps(vars(question)) + "\n" for question in questions), encoding="utf-8"
    )


def main() -> None:
    people = make_unseen_people(9, seed=SEED)
    write("person", *make_page(people[:1], SEED))
    write("people", *make_page(people[1:], SEED))


if __name__ == "__main__":
    main()
