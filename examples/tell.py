"""Tell a distilled student about a person, ask in three ways, forget her: python examples/tell.py [a run or a student]"""

import sys

from dmt.editing import open_fact_store, parse_fact, resolve_student_folder
from dmt.editing.fact_store import generate_text

ADA = "Ada Winterbourne"
TOLD = (f"{ADA} was born in the town of Ravenhill.", f"{ADA} is employed by Atlas Shipping.")
ASKED = (
    f"Where was {ADA} born? In",
    f"The birthplace of {ADA} is",
    f"Who employs {ADA}? The firm of",
)


def show(book, when):
    print(when)
    for question in ASKED:
        print(f"  {question}{generate_text(book, question, max_new_tokens=4)}")


with open_fact_store(resolve_student_folder(sys.argv[1] if len(sys.argv) > 1 else None)) as book:
    show(book, "before")
    written = book.write([parse_fact(sentence, tag="example") for sentence in TOLD])
    show(
        book,
        "told, "
        + ", ".join(f"{each.prob_before:.4f} -> {each.prob_after:.4f}" for each in written),
    )
    book.forget([each.fact.id for each in written])
    show(book, "forgotten")
