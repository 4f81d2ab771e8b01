"""Tell a distilled student about a person, ask in three ways, forget her: python examples/tell.py [a run or a student]"""

import sys

from dmt.facts import fact_of, open_book, student_folder
from dmt.facts.asking import say

ADA = "Ada Winterbourne"
TOLD = (f"{ADA} was born in the town of Ravenhill.", f"{ADA} is employed by Atlas Shipping.")
ASKED = (f"Where was {ADA} born? In", f"The birthplace of {ADA} is", f"Who employs {ADA}? The firm of")


def show(book, when):
    print(when)
    for question in ASKED:
        print(f"  {question}{say(book, question, tokens=4)}")


with open_book(student_folder(sys.argv[1] if len(sys.argv) > 1 else None)) as book:
    show(book, "before")
    written = book.write([fact_of(sentence, tag="example") for sentence in TOLD])
    show(book, "told, " + ", ".join(f"{each.before:.4f} -> {each.likely:.4f}" for each in written))
    book.forget([each.fact.id for each in written])
    show(book, "forgotten")
